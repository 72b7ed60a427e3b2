"""Names from outside: no report lets one be markup or a command, and none leads out of a folder."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ARD, Harness, sentence
from rich.console import Console
from written import record, trained

from harness.cli.console import Plain
from harness.errors import UsageError, printable
from harness.files import check_name, inside, read_tensors, write_tensors
from harness.records import Record, publish_records, write_record
from harness.report.latex import escaped
from harness.report.markdown import cell, prose
from harness.runs.export import command_of
from harness.tasks import Task, load_task

SCRIPT = "<script>alert(1)</script>"
NASTY = (
    SCRIPT,
    "a | b",
    "a\nb",
    "\x1b[2J\x1b]0;title\x07",
    "$(touch mark)",
    r"\input{/etc/passwd}",
    "[click](javascript:alert(1))",
    "![picture](http://evil/x.png)",
    "[bold]x[/]",
    "[/nothing]",
    ":smile:",
    "$x^2$ and $\\frac$",
    "\u202egnp.exe",
    "@@BODY@@",
    '" onload="alert(1)',
)
"""Texts that mean something to HTML, Markdown, LaTeX, a terminal, a shell, rich or matplotlib."""
NAMES = [text for text in NASTY if text[0].isalnum() and text.isprintable()] + [
    f"x{text}" for text in NASTY if text.isprintable() and not {"/", "\\"} & {*text}
]
"""Those that can be names."""


def hostile(folder: Path) -> list[Record]:
    """Records whose free texts, methods and options are nasty, in a results folder."""
    made = []
    for number, text in enumerate(NASTY):
        options = {"solver": text, text: [text]}
        name = NAMES[number % len(NAMES)]
        changes: dict[str, Any] = {"options": options, "flags": [text], "hashes": {"a": text}}
        made.append(
            trained(name, 3.0 + number, seed=0).model_copy(
                update={**changes, "run_id": f"r{number}-{name}"}
            )
        )
        failed = {"status": "failed", "reason": text, "metrics": {}, "run_id": f"f{number}"}
        made.append(record(f"y{number}", seed=0).model_copy(update={**changes, **failed}))
    made = [Record.model_validate(json.loads(one.model_dump_json())) for one in made]
    for one in made:
        write_record(folder / "runs" / one.run_id / "record.json", one)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hostile(tmp_path / "results")
    return tmp_path / "results"


def printed(done: Any) -> str:
    assert done.code == 0, done.err
    assert "\x1b" not in done.out + done.err
    assert "\u202e" not in done.out + done.err
    return done.out


class Tags(html.parser.HTMLParser):
    """The tags of a page, and the attributes that could run something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, value in attrs if name.startswith("on")]
        self.handlers += [
            str(value)
            for name, value in attrs
            if "javascript:" in str(value) and not name.startswith("data-") and name != "alt"
        ]  # data and alternative texts lead nowhere


def test_html_has_the_pages_own_script_alone(folder: Path, harness: Harness) -> None:
    page = printed(harness("report", folder, "--format", "html"))
    found = Tags()
    found.feed(page)
    assert found.tags.count("script") == 1
    assert found.handlers == []
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("<table") == page.count("</table>")


def test_markdown_keeps_its_tables_and_has_no_tags(folder: Path, harness: Harness) -> None:
    page = printed(harness("report", folder))
    assert "<" not in re.sub(r"&lt;| < ", "", page)
    assert "](" not in page
    table: list[str] = []
    for line in [*page.split("\n"), ""]:
        if line.startswith("|"):
            table.append(line)
            continue
        cells = {len(re.findall(r"(?<!\\)\|", row)) for row in table}
        assert len(cells) <= 1, table
        table = []
    assert all(text in page for text in ("a \\| b", "a\\\\nb", "&lt;script>alert(1)"))


def test_latex_has_no_commands_of_names(folder: Path, harness: Harness) -> None:
    text = printed(harness("report", folder, "--format", "latex"))
    known = r"\\(begin|end|centering|caption|toprule|midrule|bottomrule|pm|times|downarrow|uparrow)"
    rest = re.sub(known + r"\b|\\text(backslash|asciitilde|asciicircum)\{\}|\\[&%$#_{}]|\\\\$", "",
                  text, flags=re.M)  # fmt: skip
    assert "\\" not in rest
    body = text.partition(r"\midrule")[2].partition(r"\bottomrule")[0].strip()
    columns = text.partition(r"\toprule")[2].partition(r"\midrule")[0].count(" & ")
    assert {len(re.findall(r"(?<!\\)&", row)) for row in body.split("\n")} == {columns}


def test_csv_has_equal_rows(folder: Path, harness: Harness) -> None:
    text = printed(harness("report", folder, "--format", "csv"))
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    assert len({len(row) for row in rows}) == 1
    assert not any(row[1][:1] in "=+-@" for row in rows)


def test_the_terminal_gets_text(folder: Path, harness: Harness) -> None:
    out = printed(harness("status", folder)).replace("\n", "")
    assert "[/nothing]" in out
    assert ":smile:" in out


def test_json_is_ascii_where_it_does_not_print(folder: Path, harness: Harness) -> None:
    found = json.loads(printed(harness("report", folder, "--json")))
    assert len(found) == 2 * len(NASTY)


def test_publishing_writes_only_its_pages(folder: Path, harness: Harness) -> None:
    before = {path for path in folder.parent.rglob("*") if folder not in path.parents}
    printed(harness("report", folder, "--publish"))
    page = (folder / "tiny" / "README.md").read_text()
    assert "<script" not in page
    assert "\x1b" not in page
    assert "](javascript" not in page
    assert {path for path in folder.parent.rglob("*") if folder not in path.parents} == before


def test_a_sentence_is_one_line_whatever_it_quotes(harness: Harness) -> None:
    for text in (*NASTY, "\udcff", "x" * 10**6):
        for words in (("run", "--method", text), ("run", "--method", "ard", "--task", text)):
            done = harness(*words)
            said = sentence(done, 2)
            assert printable(said) == said
            assert len(said) < 3000
        done = harness("run", f"--{text}")
        assert done.code == 2
        assert "\x1b" not in done.err
        assert "Traceback" not in done.err


@pytest.mark.parametrize("text", NASTY)
def test_escapes(text: str) -> None:
    assert "<" not in prose(text)
    assert "\n" not in cell(text)
    assert not re.search(r"(?<!\\)\|", cell(text))
    assert not re.search(r"\\(?!text|[&%$#_{}])", escaped(text))
    console = Plain(file=io.StringIO(), width=200)
    console.print(text)
    assert console.file.getvalue() == printable(text).replace("\\n", "\n") + "\n"  # type: ignore[attr-defined]


def test_rich_itself_would_take_names_for_markup() -> None:
    """So that the test above can fail."""
    console = Console(file=io.StringIO(), width=200)
    console.print("[bold]x[/] :smile:")
    assert console.file.getvalue() == "x 😄\n"  # type: ignore[attr-defined]


# names that are paths


BAD_NAMES = ["", ".", "..", "../x", "/etc/x", "a/b", "a\\b", "-x", ".x", "a\0b", "a\nb", "x" * 121]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(UsageError, match="should be a name"):
        check_name(name, "it")


@pytest.mark.parametrize("name", ["a", "SD 3.5 (Turbo)", "größe", "7b", f"x{SCRIPT[:8]}"])
def test_other_names_are_fine(name: str) -> None:
    assert check_name(name, "it") == name


@pytest.mark.parametrize("field", ["run_id", "task", "method", "trained_in"])
@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "..", "a/b"])
def test_a_record_leads_nowhere(field: str, name: str, harness: Harness, tmp_path: Path) -> None:
    content = json.loads(record().model_dump_json()) | {field: name}
    path = tmp_path / "results" / "runs" / "a" / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    before = {*tmp_path.rglob("*")}
    done = harness("report", tmp_path / "results", "--publish")
    assert field in sentence(done, 2)
    assert "should be a name" in done.err
    assert {*tmp_path.rglob("*")} == before


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", ".."])
def test_run_ids_of_the_command_line_are_no_paths(
    name: str, tiny: Task, harness: Harness, tmp_path: Path
) -> None:
    results = tmp_path / "a" / "results"
    done = harness(*ARD, "--history-layers", 2, "--init-from", name, "--results", results)
    assert f"init_from is {name!r}, but should be a name" in sentence(done, 2)
    samples = tmp_path / "samples.npz"
    samples.write_bytes(b"")
    done = harness("evaluate", "--task", "tiny", "--samples", samples, "--name", name)
    assert f"--name is {name!r}, but should be a name" in sentence(done, 2)
    done = harness("student", "export", name, "--results", results)
    assert "there is no run" in sentence(done, 2)


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "a\nb"])
def test_the_name_in_a_task_is_no_path(
    name: str, tiny_folder: Path, harness: Harness, tmp_path: Path
) -> None:
    content = yaml.safe_load((tiny_folder / "tiny.yaml").read_text())
    file = tiny_folder / "mine.yaml"
    file.write_text(yaml.safe_dump({**content, "name": name}))
    done = harness("run", "--method", "teacher", "--task", file, "--results", tmp_path / "r")
    assert "should be a name" in sentence(done, 2)
    file.write_text(yaml.safe_dump({"name": "mine", "like": name}))
    done = harness("run", "--method", "teacher", "--task", file, "--results", tmp_path / "r")
    assert "unknown task" in sentence(done, 2)


def test_tasks_that_are_like_each_other_end(tiny_folder: Path, harness: Harness) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        (tiny_folder / f"{one}.yaml").write_text(f"name: {one}\nlike: {other}\n")
    done = harness("run", "--method", "teacher", "--task", "a")
    assert "which is like another one" in sentence(done, 2)


@pytest.mark.parametrize("part", ["teacher", "features"])
@pytest.mark.parametrize("place", ["../outside.safetensors", "absolute", "weights/../../o.st"])
def test_a_task_names_no_weights_outside_its_folder(
    part: str, place: str, tiny_folder: Path, harness: Harness, tmp_path: Path
) -> None:
    outside = tmp_path / "outside.safetensors"
    content = yaml.safe_load((tiny_folder / "tiny.yaml").read_text())
    outside.write_bytes(Path(content[part]["file"]).read_bytes())
    file = str(outside) if place == "absolute" else place
    content = {**content, "name": "mine", part: {"file": file}}
    (tiny_folder / "mine.yaml").write_text(yaml.safe_dump(content))
    words = ("--task", tiny_folder / "mine.yaml", "--results", tmp_path / "r", "--device", "cpu")
    done = harness("run", "--method", "teacher", *words)
    assert f"task mine names {file}, which lies outside its folder" in sentence(done, 2)


def test_training_writes_no_weights_outside(
    tiny_folder: Path, harness: Harness, tmp_path: Path
) -> None:
    """The entry would replace any .safetensors and any .yaml of this user."""
    from harness.tasks.adopt import adopt_trained

    victim = tmp_path / "victim.yaml"
    victim.write_text("mine")
    content = yaml.safe_load((tiny_folder / "tiny.yaml").read_text())
    made = Path(content["teacher"]["file"])
    content |= {"name": "mine", "teacher": {**content["teacher"], "file": "../victim.safetensors"}}
    (tiny_folder / "mine.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UsageError, match="outside its folder"):
        adopt_trained(tiny_folder / "mine.yaml", {"teacher": (made, "0" * 64)})
    assert victim.read_text() == "mine"


def test_a_link_in_the_tasks_folder_is_the_owners(tiny_folder: Path, tmp_path: Path) -> None:
    content = yaml.safe_load((tiny_folder / "tiny.yaml").read_text())
    (tmp_path / "disk").mkdir()
    moved = Path(content["teacher"]["file"]).rename(tmp_path / "disk" / "large.safetensors")
    (tiny_folder / "teacher.safetensors").symlink_to(moved)
    content |= {"teacher": {**content["teacher"], "file": "teacher.safetensors"}, "name": "mine"}
    (tiny_folder / "mine.yaml").write_text(yaml.safe_dump(content))
    import torch

    load_task(str(tiny_folder / "mine.yaml")).teacher(torch.device("cpu"))


def test_a_students_file_names_no_path(
    tiny: Task, harness: Harness, tmp_path: Path, results: Path
) -> None:
    (student,) = results.glob("runs/ard-*/student.safetensors")
    from harness.files import header_of

    facts = json.loads(header_of(student)[0]["student"])
    for field in ("task", "run_id", "method"):
        said = json.dumps({**facts, field: "../../x"})
        write_tensors(tmp_path / "s.safetensors", read_tensors(student), {"student": said})
        done = harness("evaluate", "--student", tmp_path / "s.safetensors", "--results", results)
        assert "metadata of a student that this version cannot read" in sentence(done, 2)


# links out of the results folder


def secret(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("secret")
    return folder / name


@pytest.mark.parametrize(
    "link",
    [
        "runs",
        "runs/a",
        "runs/a/record.json",
        "runs/a/samples.png",
        "tiny",
        "tiny/records.jsonl",
        "tiny/shared.json",
        "tiny/samples",
        "tiny/findings.md",
        "searches/x.json",
    ],
)
def test_links_out_of_the_results_folder_are_refused(
    link: str, harness: Harness, tmp_path: Path
) -> None:
    results, outside = tmp_path / "results", tmp_path / "outside"
    one = record().model_copy(update={"run_id": "a"})
    write_record(results / "runs" / "a" / "record.json", one)
    publish_records(results / "tiny", [one])
    place = results / link
    place.parent.mkdir(exist_ok=True)
    if place.is_dir():
        place.rename(outside)
    elif place.exists():
        outside.mkdir()
        place.rename(outside / place.name)
        outside = outside / place.name
    elif place.suffix:
        outside = secret(outside, place.name)
    else:
        outside.mkdir()
    place.symlink_to(outside)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "outside").rglob("*")}
    words = ("--format", "html") if link.endswith("samples.png") else ("--publish",)
    done = harness("report", results, *words)
    assert "is a link that leads out of" in sentence_after_lines(done, 2)
    assert "secret" not in done.out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "outside").rglob("*")} == before


def sentence_after_lines(done: Any, code: int) -> str:
    """The error of a command that has told before what it wrote."""
    assert done.code == code
    assert "Traceback" not in done.err
    return done.err.strip().split("\n")[-1]


def test_a_run_is_not_written_through_a_link(
    tiny: Task, harness: Harness, results: Path, tmp_path: Path
) -> None:
    (run,) = results.glob("runs/ard-*")
    run.rename(tmp_path / "outside")
    run.symlink_to(tmp_path / "outside")
    done = harness(*ARD, "--history-layers", 2, "--results", results)
    assert "is a link that leads out of" in sentence(done, 2)
    assert "is a link that leads out of" in sentence(harness("status", results), 2)
    done = harness("student", "export", run.name, "--results", results)
    assert "is a link that leads out of" in sentence(done, 2)


def test_a_results_folder_may_be_a_link_itself(
    tiny: Task, harness: Harness, results: Path, tmp_path: Path
) -> None:
    (tmp_path / "here").symlink_to(results)
    assert harness("report", tmp_path / "here").code == 0
    assert inside(tmp_path / "here" / "runs", tmp_path / "here")


# commands that a person copies


def test_a_printed_command_quotes_its_values(tiny: Task, results: Path) -> None:
    from harness.records import read_record

    (path,) = results.glob("runs/ard-*/record.json")
    one = read_record(path)
    one = one.model_copy(update={"options": {**one.options, "heads": "$(touch mark); ls"}})
    command = command_of(one, tiny)
    assert "$(touch mark); ls" in shlex.split(command)
