"""A method file's docstring as HTML: paragraphs, lists and equations."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

from website.mathml import GREEK, equation

KINDS = {
    "Ours": "What differs from the paper",
    "Decided here": "What differs from the paper",
    "Untrained": "What is known exactly",
}
"""Headings, by the words that a paragraph begins with."""
HEADINGS = ("Equations", *dict.fromkeys(KINDS.values()))
LETTERS = "|".join(name for name in GREEK if name not in ("eps", "pi"))
SYMBOL = re.compile(
    rf"\b(?:[A-Za-z]|{'|'.join(GREEK)})_(?:\{{[^}}]*\}}|\w+)|\b(?:{LETTERS})\b(?![-_]?[A-Za-z])"
)
"""What is a symbol in a sentence: a letter with a subscript, or the name of a Greek one."""
FORMULA = re.compile(r" [-+=/<~]|=|[A-Za-z)]\^|\(.*\)$|^log ")


@dataclass(frozen=True)
class Part:
    """A block of a docstring: its heading, and HTML."""

    heading: str
    html: str


def parts(doc: str) -> list[Part]:
    """The blocks of a docstring, without its title, in their order."""
    found: list[Part] = []
    heading = HEADINGS[0]
    for block in re.split(r"\n\s*\n", doc.strip())[1:]:
        if not block.startswith(" "):
            starts = (name for begin, name in KINDS.items() if block.startswith(begin))
            heading = next(starts, HEADINGS[0])
        found.append(Part(heading, _block(block)))
    return found


def title(doc: str) -> str:
    """A docstring's first sentence, without its full stop."""
    return " ".join(doc.strip().partition("\n\n")[0].split()).removesuffix(".")


def _block(block: str) -> str:
    if block.startswith("    "):
        lines = "".join(f"<div>{equation(line.strip())}</div>" for line in block.splitlines())
        return f'<div class="equations">{lines}</div>'
    before, *items = re.split(r"^- ", block, flags=re.MULTILINE)
    shown = f"<p>{sentence(before)}</p>" if before.strip() else ""
    if items:
        shown += "<ul>" + "".join(f"<li>{sentence(item)}</li>" for item in items) + "</ul>"
    return shown


def sentence(text: str) -> str:
    """A sentence with its symbols, formulas in backticks and names of options, as HTML."""
    pieces = re.split(r"`([^`]+)`", " ".join(text.split()))
    return "".join(_code(piece) if odd % 2 else _plain(piece) for odd, piece in enumerate(pieces))


def _code(text: str) -> str:
    if FORMULA.search(text) and not text.startswith("harness "):
        try:
            return equation(text)
        except ValueError:
            pass
    return f"<code>{html.escape(text)}</code>"


def _plain(text: str) -> str:
    place, shown = 0, ""
    for found in SYMBOL.finditer(text):
        shown += html.escape(text[place : found.start()]) + equation(found.group())
        place = found.end()
    return shown + html.escape(text[place:])
