"""Pictures and verdicts from elsewhere: what prompts ask, result lines, and what tells them apart.

Result lines are GenEval's (Ghosh et al. 2023, arXiv 2310.11513), one a picture.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from harness.data.geneval import PromptFolders, Verdict
from harness.data.pictures import Pictures
from harness.data.scene_prompts import COLOURS, OBJECTS, Prompt, parse
from harness.errors import UsageError
from harness.files import digest
from harness.metrics.following import Reading, Thing
from harness.metrics.spaces import JudgeSpace, Space
from harness.records import Metric
from harness.tasks import Task


def asked(pictures: PromptFolders) -> tuple[Prompt, ...]:
    """What the prompts of scenes mean. Raises UsageError for one that the grammar does not have."""
    found = []
    for number, told in enumerate(pictures.metadata):
        try:
            found.append(parse(told["prompt"]))
        except UsageError as error:
            raise UsageError(f"{pictures.path}, prompt folder {number}: {error}") from error
    return tuple(found)


def known_of(pictures: Pictures, space: Space) -> dict[str, Any]:
    """Inputs of metrics that follow from pictures and their prompts, by name. Raises as `asked`."""
    if not isinstance(pictures, PromptFolders):
        return space.of_pictures(pictures)
    meant = asked(pictures) if isinstance(space, JudgeSpace) else None
    found = {**space.of_pictures(pictures), "prompts": pictures.prompts}
    if meant:
        found["reading"] = Reading(pictures.numbers, meant, found["seen"])
    return found


def unlike(task: Task, pictures: Pictures) -> dict[str, Any]:
    """What tells pictures from elsewhere from the task's own samples, for their identity."""
    found: dict[str, Any] = {}
    if pictures.shape != (task.picture_shape or task.shape):
        found["size"] = list(pictures.shape)
    if isinstance(pictures, PromptFolders):
        found |= other_prompts(task, pictures.prompts)
    elif pictures.labels is not None and task.spec.evaluation.labels == "balanced":
        counts = pictures.labels.bincount(minlength=task.num_classes)
        if int(counts.max() - counts.min()) > 1:
            found["labels"] = "not balanced"
    return found


def other_prompts(task: Task, prompts: Sequence[str]) -> dict[str, str]:
    """An entry for identities if prompts, one a picture, are not those of a noise set.

    Their order does not count. Where the task draws its prompts, each must be one of them.
    """
    texts = [told["prompt"] for told in task.judged_prompts or ()]
    mine = Counter(prompts)
    if task.spec.evaluation.labels == "drawn":
        same = mine.keys() <= set(texts)
    else:
        same = bool(texts) and mine == Counter(texts[i % len(texts)] for i in range(len(prompts)))
    return {} if same else {"prompts": f"others, {digest(sorted(mine.items()))[:8]}"}


def result_lines(pictures: PromptFolders, reading: Reading) -> Iterator[dict[str, Any]]:
    """The result line of each picture, in the order of folders, as GenEval's judge writes them.

    `details` holds the centres of what was found, since the task's detector knows no boxes.
    """
    order = sorted(range(len(pictures)), key=lambda i: pictures.files[i].parts)
    for i in order:
        number, seen = int(reading.numbers[i]), reading.seen[i]
        prompt, checks = reading.prompts[number], reading.checks[i]
        details: dict[str, list[dict[str, Any]]] = {}
        for one in seen:
            place = {"color": COLOURS[one.colour], "x": round(one.x, 2), "y": round(one.y, 2)}
            details.setdefault(OBJECTS[one.object], []).append(place)
        yield {
            "filename": str(pictures.files[i]),
            "tag": prompt.category,
            "prompt": prompt.text,
            "correct": all(checks.values()),
            "reason": "\n".join(_reasons(prompt, seen, checks)),
            "metadata": json.dumps(pictures.metadata[number]),
            "details": json.dumps(details),
        }


def _reasons(prompt: Prompt, seen: Sequence[Thing], checks: dict[str, bool]) -> Iterator[str]:
    """What a scene does not follow, a sentence for each part; nothing if it follows all."""
    wanted = " and ".join(one.text for one in prompt.things)
    found = Counter(f"{COLOURS[one.colour]} {OBJECTS[one.object]}" for one in seen)
    listed = ", ".join(f"{count} {name}" for name, count in sorted(found.items())) or "nothing"
    if parts := [part for part in ("object", "count", "color") if not checks[part]]:
        yield f"expected {wanted}, found {listed} ({', '.join(parts)})"
    if not checks["position"]:
        yield f"expected {prompt.text}, found another place (position)"


def judged_metrics(task: Task, verdicts: Sequence[Verdict], judge: str) -> dict[str, Metric]:
    """The shares of followed prompts by an outside judge: of all pictures, and by tag.

    The judge's name is part of their identity, so they share no column with other judges'.
    """
    groups: dict[str, list[bool]] = {"prompts_followed": [one.correct for one in verdicts]}
    for one in verdicts:
        groups.setdefault(f"followed_{one.tag}", []).append(one.correct)
    fixed = {
        "task": task.spec.name,
        "task_version": task.spec.version,
        "conditions": task.conditions_hash,
        "guidance": task.spec.guidance.model_dump(),
        "judge": judge,
        **other_prompts(task, [one.prompt for one in verdicts]),
    }
    return {
        name: Metric(
            values={0: sum(correct) / len(correct)},
            n=len(correct),
            direction="higher",
            identity={"metric": name, "n": len(correct), **fixed},
        )
        for name, correct in groups.items()
    }
