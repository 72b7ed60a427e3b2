"""Damage to any file that is read is told in a sentence or mended; it never becomes a number."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import pytest
from damage import FAULTS, Tree, answer, damages
from damaged_tree import Place

from harness.tasks import task_files

LONG = 12
"""Damages of each file by each fault in the long version."""
KINDS = (
    "teacher",
    "classifier",
    "prompt embeddings",
    "text encoder",
    "npz",
    "compressed npz",
    "tar shards",
    "PNG",
    "index of a tar file",
    "unpacked npz",
    "digest of images",
    "latents",
    "plan of latents",
    "trajectories",
    "samples and features",
    "checkpoint",
    "record",
    "published records",
    "student",
    "snapshots of averages",
    "exported student",
    "saved samples",
    "milestones",
    "log",
    "database of a search",
    "outcome of a search",
    "baseline",
    "others' checkpoint",
    "others' old checkpoint",
    "sweep file",
    "search file",
    "task file",
    "claims",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Place, Tree]]:
    """The tree of all files, made once; a test puts it back as it was."""
    folder = tmp_path_factory.mktemp("tree")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_files, "FOLDER", folder / "tasks")
        patch.setenv("HARNESS_CACHE", str(folder / "cache"))
        made = Place(folder)
        made.make()
        yield made, Tree(folder)


def hit(place: tuple[Place, Tree], name: str, seeds: range) -> Counter[str]:
    """Damages every file of a kind by every fault, once for each seed, and counts what followed."""
    made, tree = place
    kind = made.kinds()[name]
    expected, counts = [], Counter[str]()

    def whole() -> object:
        if not expected:
            tree.restore()
            expected.append(kind.read())
        return expected[0]

    if kind.outcomes != ("refused",):
        whole()
        tree.restore()
    for seed in seeds:
        for fault, path in damages(tree, kind, tuple(FAULTS), seed):
            try:
                found = answer(kind, path, whole)
            except Exception as error:
                raise AssertionError(
                    f"{fault} of {path.name}, seed {seed}: {type(error).__name__}: {error}"
                ) from error
            assert found in kind.outcomes, f"{fault} of {path.name}, seed {seed}: {found}"
            counts[found] += 1
    return counts


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_told_or_mended(name: str, place: tuple[Place, Tree]) -> None:
    """`tox -e slow` does it twelve times as often."""
    counts = hit(place, name, range(1))
    assert sum(counts.values()) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_much_damage_is_told_or_mended(name: str, place: tuple[Place, Tree]) -> None:
    """`pytest -m slow -s tests/test_damage.py` prints the counts of docs/reliability.md."""
    counts = hit(place, name, range(1, 1 + LONG))
    print(f"\n{name}: {sum(counts.values())} damages, {dict(sorted(counts.items()))}")


def test_every_kind_is_hit(place: tuple[Place, Tree]) -> None:
    assert tuple(place[0].kinds()) == KINDS


@pytest.mark.parametrize(
    ("name", "files", "outcome"),
    [
        ("latents", "latents/*.safetensors", "refused"),
        ("trajectories", "trajectories/*/*.safetensors", "rebuilt"),
        ("samples and features", "samples/*/samples.safetensors", "rebuilt"),
        ("record", "runs/step-distillation-2-*/record.json", "refused"),
        ("student", "runs/step-distillation-2-*/student.safetensors", "refused"),
        ("teacher", "tasks/weights/*.safetensors", "refused"),
    ],
)
def test_whole_files_in_each_others_place(
    name: str, files: str, outcome: str, place: tuple[Place, Tree]
) -> None:
    """Each of them is whole."""
    made, tree = place
    kind = made.kinds()[name]
    expected = kind.read()
    tree.restore()
    mine = tree.of(kind)[0]
    other = next(path for path in sorted(tree.files) if path.match(files) and path != mine)
    for path, content in ((mine, tree.files[other]), (other, tree.files[mine])):
        path.unlink()
        path.write_bytes(content)
    try:
        assert answer(kind, mine, lambda: expected) == outcome
    finally:
        tree.restore()


@pytest.mark.parametrize("name", ["record", "published records", "baseline", "outcome of a search"])
def test_a_changed_digit_is_refused(name: str, place: tuple[Place, Tree]) -> None:
    """The file is still JSON of the right types."""
    made, tree = place
    kind = made.kinds()[name]
    path = tree.of(kind)[0]
    text = path.read_text()
    number = re.search(r"(?<=[ :])\d+\.\d{4,}(?=[,}\n])", text)
    assert number is not None
    other = f"{number[0][:-1]}{(int(number[0][-1]) + 1) % 10}"
    path.write_text(text[: number.start()] + other + text[number.end() :])
    try:
        assert answer(kind, path, lambda: None) == "refused"
    finally:
        tree.restore()
