"""Equations as method files write them, as MathML, which browsers draw without a script.

    equation("L = |G(x_T) - x_0|^2")

Greek names become letters; `x_0`, `f^-`, `x_hat` and `x~` become subscripts, superscripts and
accents; words of several letters stay words.
"""

from __future__ import annotations

import html
import re

NAMES = "alpha beta gamma delta eps theta kappa lambda mu nu pi rho sigma tau phi omega"
GREEK = dict(zip(NAMES.split(), "αβγδεθκλμνπρστφω", strict=True))
FUNCTIONS = {"sg", "exp", "log", "cos", "sin", "tan", "max", "min", "clamp", "mean", "sigmoid"}
FUNCTIONS |= {"softmax"}
MARKED = set("fFGgvD")
"""Functions whose average is written with a minus, so `f^-(x)` is no power."""
SYMBOLS = {"<-": "←", "->": "→", "<=": "≤", ">=": "≥", "-": "−", "~": "∼", "*": "·", "...": "…"}
TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<number>\d+(?:[.,]\d+)*%?)|(?P<word>[A-Za-z]+(?:'s\b)?|`[^`]+`)"
    r"|(?P<symbol>\.\.\.|<-|->|<=|>=|[-+*/=<>~,:;.()\[\]|%'^_{}])"
)


def equation(text: str) -> str:
    """One line of mathematics as a `math` element; raises ValueError for what it cannot read."""
    return f"<math><mrow>{_Reader(text).row()}</mrow></math>"


class _Reader:
    """Reads a line from left to right."""

    def __init__(self, text: str):
        self.tokens: list[tuple[str, str]] = []
        place = 0
        while place < len(text):
            found = TOKEN.match(text, place)
            if not found or not found.lastgroup:
                raise ValueError(f"{text!r} has {text[place]!r}, which is no mathematics here")
            self.tokens.append((found.lastgroup, found.group()))
            place = found.end()
        self.at = 0

    def peek(self, ahead: int = 0) -> str:
        place = self.at + ahead
        return self.tokens[place][1] if place < len(self.tokens) else ""

    def row(self, until: str = "") -> str:
        """Elements up to a closing bracket, which is taken away, or to the end."""
        parts: list[str] = []
        opening = True  # whether a minus here is a sign
        while self.at < len(self.tokens):
            kind, text = self.tokens[self.at]
            if until and text == until:
                self.at += 1
                break
            if kind == "space":
                self.at += 1
                parts.append(_gap(text, self.peek()))
                continue
            parts.append(self.scripted(opening))
            opening = text in ("(", "[", "{", ",", "=", "|", "/")
        return "".join(parts)

    def scripted(self, opening: bool) -> str:
        """An element with its accents, subscript and superscript."""
        kind, text = self.tokens[self.at]
        bar = text == "|" and self.peek(-1).isspace() and self.peek(1).isspace() and self.at
        self.at += 1
        base, low, high = _atom(kind, text, opening, bool(bar)), "", ""
        while self.at < len(self.tokens):
            following = self.peek()
            if following == "~" and kind == "word":
                self.at += 1
                base = _over(base, "~")
            elif following == "'" and (kind == "word" or low):
                self.at += 1
                high += "<mo>′</mo>"
            elif following == "_" and self.peek(1):
                self.at += 1
                if self.peek() == "hat":
                    self.at += 1
                    base = _over(base, "^")
                else:
                    low = self.argument()
            elif following == "^":
                self.at += 1
                after = self.peek()
                if not after or after.isspace() or after in "_),|]":
                    base = _over(base, "^")
                elif after == "-" and (text in MARKED or not self.peek(1) or low):
                    self.at += 1
                    high += "<mo>−</mo>"
                else:
                    high += self.argument()
            else:
                break
        return _with_scripts(base, low, high)

    def argument(self) -> str:
        """What stands in a subscript or superscript: a group, or a sign and an element."""
        sign = ""
        if self.peek() == "-":
            self.at += 1
            sign = "<mo>−</mo>"
        kind, text = self.tokens[self.at]
        self.at += 1
        if text in "({":
            return f"<mrow>{sign}{self.row(')' if text == '(' else '}')}</mrow>"
        if kind == "word" and len(text) == 2 and text not in GREEK:
            return f"<mrow>{''.join(f'<mi>{letter}</mi>' for letter in text)}</mrow>"
        found = _atom(kind, text, False, False)
        return f"<mrow>{sign}{found}</mrow>" if sign else found


def _gap(space: str, following: str) -> str:
    """Wide gaps separate equations, narrow ones factors."""
    if len(space) > 1:
        return '<mspace width="1.5em"/>'
    return '<mspace width="0.2em"/>' if following[:1].isalnum() or following == "|" else ""


def _atom(kind: str, text: str, opening: bool, bar: bool) -> str:
    if kind == "number":
        return f"<mn>{text}</mn>"
    if kind == "word":
        return _word(text)
    if text == "|":
        space = "0.3em" if bar else "0"
        return f'<mo stretchy="false" lspace="{space}" rspace="{space}">|</mo>'
    sign = ' form="prefix"' if text == "-" and opening else ""
    still = ' stretchy="false"' if text in "()[]{}" else ""
    return f"<mo{sign}{still}>{html.escape(SYMBOLS.get(text, text))}</mo>"


def _word(text: str) -> str:
    if text in GREEK:
        return f"<mi>{GREEK[text]}</mi>"
    if text == "sum":
        return "<mo>∑</mo>"
    if text in FUNCTIONS:
        return f"<mi>{text}</mi>"
    if text[0] == "d" and (len(text) == 2 or text[1:] in GREEK):
        return f"<mi>d</mi>{_word(text[1:])}"
    text = html.escape(text.strip("`"))
    return f"<mi>{text}</mi>" if len(text) == 1 else f"<mtext>{text}</mtext>"


def _over(base: str, mark: str) -> str:
    return f'<mover accent="true"><mrow>{base}</mrow><mo stretchy="false">{mark}</mo></mover>'


def _with_scripts(base: str, low: str, high: str) -> str:
    base = f"<mrow>{base}</mrow>" if (low or high) and base.count("<mi") > 1 else base
    high = f"<mrow>{high}</mrow>" if high.count("<mo") > 1 else high
    if low and high:
        return f"<msubsup>{base}{low}{high}</msubsup>"
    if low:
        return f"<msub>{base}{low}</msub>"
    return f"<msup>{base}{high}</msup>" if high else base
