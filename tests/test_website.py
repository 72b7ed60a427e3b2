"""The parts of the documentation site, and the links of every page of the repository."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from harness.methods import METHODS
from website import links, method_pages, pictures, texts
from website.mathml import equation
from website.offline import loaded

ROOT = links.ROOT
PAGES = sorted(ROOT.glob("*.md"))
for folder in ("docs", "results", "benchmarks", "examples", "tests", ".github"):
    PAGES += sorted((ROOT / folder).rglob("*.md"))


def inside(text: str) -> str:
    return equation(text).removeprefix("<math><mrow>").removesuffix("</mrow></math>")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x_0", "<msub><mi>x</mi><mn>0</mn></msub>"),
        ("sigma^2", "<msup><mi>σ</mi><mn>2</mn></msup>"),
        ("f^-", "<msup><mi>f</mi><mo>−</mo></msup>"),
        ("x_t'", "<msubsup><mi>x</mi><mi>t</mi><mo>′</mo></msubsup>"),
        ("u_{-1}", '<msub><mi>u</mi><mrow><mo form="prefix">−</mo><mn>1</mn></mrow></msub>'),
        ("sg", "<mi>sg</mi>"),
        ("dtau", "<mi>d</mi><mi>τ</mi>"),
        ("the end", '<mtext>the</mtext><mspace width="0.2em"/><mtext>end</mtext>'),
        (
            "x~",
            '<mover accent="true"><mrow><mi>x</mi></mrow><mo stretchy="false">~</mo></mover>',
        ),
    ],
)
def test_an_equation(text: str, expected: str) -> None:
    assert inside(text) == expected


def test_what_is_no_equation_is_refused() -> None:
    with pytest.raises(ValueError, match="'§'"):
        equation("a § b")


def test_a_docstring_becomes_parts() -> None:
    doc = "Title.\n\nA `code` and `x = 1`:\n\n    y = x_0\n\nOurs: less.\n\n"
    doc += "- one\n- two\n\nUntrained: z."
    found = texts.parts(doc)
    assert texts.title(doc) == "Title"
    assert [part.heading for part in found] == [
        "Equations",
        "Equations",
        "What differs from the paper",
        "Equations",
        "What is known exactly",
    ]
    assert found[0].html == f"<p>A <code>code</code> and {equation('x = 1')}:</p>"
    assert found[3].html == "<ul><li>one</li><li>two</li></ul>"


@pytest.mark.parametrize("name", METHODS.names())
def test_a_methods_page(name: str) -> None:
    """It has its picture, its cost and its options, and all its XML can be read."""
    assert name in pictures.captions(), f"add the idea of {name} to website/pictures.yaml"
    text = method_pages.page(name)
    assert text.startswith(f"# {name}\n")
    for piece in re.findall(r"<math>.*?</math>|<svg.*?</svg>", text):
        ElementTree.fromstring(piece)
    assert "<svg" in text
    assert all(
        f"`--{field.replace('_', '-')}`" in text for field in METHODS[name].Config.model_fields
    )


def test_pictures_and_differences_name_methods_that_exist() -> None:
    lines = method_pages.TEXTS.read_text().splitlines()
    named = {name for line in lines for name in method_pages.named(line)}
    assert len(named) > 15
    assert named | set(pictures.captions()) <= set(METHODS.names())


def test_the_ways_are_the_exact_flow() -> None:
    """The mixture is symmetric, so a way's mirror image is a way, and each ends at a mode."""
    ends = pictures.ways()[-1]
    assert [round(float(end)) for end in ends] == [-1, -1, -1, 1, 1]
    x = pictures.np.array([-0.7, 0.7])
    assert pictures.velocity(x, 0.4).sum() == pytest.approx(0)


def test_a_methods_rows_are_those_of_the_records() -> None:
    shown = [name for name in METHODS.names() if "### On digits" in method_pages.page(name)]
    records = (ROOT / "results" / "digits" / "records.jsonl").read_text()
    assert set(shown) <= {name for name in METHODS.names() if f'"{name}"' in records}
    assert len(shown) > 10


def slugs(path: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    text = links.CODE.sub("", path.read_text())
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page(page: Path) -> None:
    name = page.relative_to(ROOT).as_posix()
    for target, anchor in links.targets(name, page.read_text()):
        assert (ROOT / target).exists(), f"{name} links to {target}"
        assert not anchor or anchor in slugs(ROOT / target), f"{target} has no #{anchor}"


def test_links_are_rewritten_for_the_site() -> None:
    text = "[a](../results/README.md#b) [c](../harness) ![d](p.png) [e](#f)\n```\n[g](h.md)\n```\n"
    known = {"results/README.md": "results/README.md", "docs/p.png": "p.png"}
    assert links.rewritten("docs/x.md", text, known.get) == (
        "[a](results/README.md#b) c ![d](p.png) [e](#f)\n```\n[g](h.md)\n```\n"
    )


def test_a_page_that_loads_from_a_network_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a href="https://a.b/c">c</a><script src="own.js"></script>')
    assert loaded(tmp_path) == []
    (tmp_path / "b.html").write_text('<script async src="https://a.b/c.js"></script>')
    (tmp_path / "c.css").write_text("@font-face { src: url(//a.b/c.woff) }")
    assert loaded(tmp_path) == ["b.html loads https://a.b/c.js", "c.css loads //a.b/c.woff"]


@pytest.mark.slow
def test_the_site_is_built(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    words = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file=website/mkdocs.yml",
    ]
    subprocess.run([*words, f"--site-dir={tmp_path}"], cwd=ROOT, check=True)
    assert loaded(tmp_path) == []
    assert (tmp_path / "index.html").is_file()
