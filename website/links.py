"""Links of Markdown pages: which file of the repository each one means."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
CODE = re.compile(r"^(```+|~~~+).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
FOREIGN = re.compile(r"[a-z]+:")


def site_name(name: str) -> str:
    """Where a file of the repository stands in the site: `docs/` is its root."""
    return "index.md" if name == "README.md" else name.removeprefix("docs/")


def targets(page: str, text: str) -> Iterator[tuple[str, str]]:
    """The files, relative to the repository, and anchors that a page links to."""
    bare = CODE.sub("", text)
    for found in LINK.finditer(bare):
        if not FOREIGN.match(found[3]):
            yield resolved(page, found[3])


def resolved(page: str, link: str) -> tuple[str, str]:
    """The file and the anchor that a link of a page means; the page itself for an anchor alone."""
    path, _, anchor = link.partition("#")
    if not path:
        return page, anchor
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), path)), anchor


def rewritten(page: str, text: str, where: Callable[[str], str | None]) -> str:
    """A page's text with links that hold in the site.

    Args:
        page: its file in the repository.
        text: Markdown; code keeps its bytes.
        where: from a file in the repository to one in the site, or None for what it leaves out; a
            link to that becomes its text.
    """
    here = posixpath.dirname(site_name(page)) or "."

    def one(found: re.Match[str]) -> str:
        if FOREIGN.match(found[3]) or found[3].startswith("#"):
            return found[0]
        name, anchor = resolved(page, found[3])
        target = where(name)
        if target is None:
            return found[2]
        link = posixpath.relpath(target, here) + (f"#{anchor}" if anchor else "")
        return f"{found[1]}[{found[2]}]({link})"

    shown, place = "", 0
    for code in CODE.finditer(text):
        shown += LINK.sub(one, text[place : code.start()]) + code[0]
        place = code.end()
    return shown + LINK.sub(one, text[place:])
