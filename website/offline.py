"""Refuses a site whose pages load anything from a network: `python -m website.offline FOLDER`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

LOADS = re.compile(
    r"<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)"
    r"|url\(\s*[\"']?((?:https?:)?//[^\"')\s]+)|@import\s+[\"']((?:https?:)?//[^\"']+)",
    re.IGNORECASE,
)


def loaded(folder: Path) -> list[str]:
    """What pages and style sheets below a folder load from elsewhere, a line each.

    A link to read on, such as that of a paper, is none.
    """
    return [
        f"{path.relative_to(folder)} loads {next(filter(None, found.groups()))}"
        for kind in ("*.html", "*.css")
        for path in sorted(folder.rglob(kind))
        for found in LOADS.finditer(path.read_text(encoding="utf-8"))
        if 'rel="canonical"' not in found[0]
    ]


def main(words: list[str]) -> int:
    """Prints what is loaded and returns the exit code."""
    (folder,) = words
    found = loaded(Path(folder))
    print("\n".join(found) or f"{folder} loads nothing from a network")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
