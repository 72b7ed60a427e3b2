"""What mkdocs calls: adds the pages that are made at build time, and makes links hold."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from harness.methods import METHODS
from website.links import ROOT, rewritten, site_name, targets
from website.method_pages import page as method_page

PAGES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "examples/README.md",
)
TABLES = ("results/**/*.md", "results/**/*.png", "results/**/*.html")
SHOWN = {".py": "python", ".yaml": "yaml", ".cff": "yaml", ".bib": "bibtex", ".toml": "toml"}
"""Kinds of files that become pages of their own when a page links to them."""

SHIM = re.compile(r'<script src="https://unpkg\.com/iframe-worker/shim"></script>')


def api_pages(rooms: dict[str, list[str]]) -> dict[str, str]:
    """A page for each room, with the modules that `extra.api` of mkdocs.yml names."""
    return {
        f"api/{room}.md": f"# {room}\n\n" + "\n\n".join(f"::: {module}" for module in modules)
        for room, modules in rooms.items()
    }


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the pages of methods and of the interface into the navigation."""
    lists = {
        "methods": [f"methods/{name}.md" for name in METHODS.names()],
        "api": [{room: f"api/{room}.md"} for room in config.extra["api"]],
    }
    config.nav = _filled(config.nav, lists)
    return config


def _filled(nav: Any, lists: dict[str, list[Any]]) -> Any:
    """The navigation with `$NAME` replaced by a list's entries."""
    if isinstance(nav, dict):
        return {title: _filled(entry, lists) for title, entry in nav.items()}
    if not isinstance(nav, list):
        return nav
    found = []
    for entry in nav:
        known = isinstance(entry, str) and entry.startswith("$")
        found += lists[entry[1:]] if known else [_filled(entry, lists)]
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what does not lie in docs/."""
    made = {f"methods/{name}.md": method_page(name) for name in METHODS.names()}
    made |= api_pages(config.extra["api"])
    texts = [ROOT / name for name in PAGES]
    texts += [path for pattern in TABLES for path in sorted(ROOT.glob(pattern))]
    for path in texts:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, site_name(name), abs_src_path=str(path)))
    for linked in _linked(files):
        path = ROOT / linked
        if path.suffix in SHOWN and path.is_file():
            text = path.read_text(encoding="utf-8")
            made[_source(linked)] = f"# {linked}\n\n````{SHOWN[path.suffix]}\n{text}````\n"
    style = Path(__file__).with_name("site.css")
    files.append(File.generated(config, style.name, abs_src_path=str(style)))
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def _source(name: str) -> str:
    return f"source/{name}.md"


def _linked(files: Files) -> set[str]:
    """What the pages of the repository link to."""
    return {
        name
        for file in files.documentation_pages()
        for name, _ in targets(_repository_name(file), file.content_string)
    }


def _repository_name(file: File) -> str:
    """The file of the repository that a page is made of; the place in docs/ of one made here."""
    if file.abs_src_path is None:
        return f"docs/{file.src_uri}"
    return Path(file.abs_src_path).resolve().relative_to(ROOT).as_posix()


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Makes links between files of the repository links between pages of the site."""

    def where(name: str) -> str | None:
        inside = (site_name(name), _source(name), posixpath.join(site_name(name), "README.md"))
        known = next((each for each in inside if files.get_file_from_path(each)), None)
        if known is None and not (ROOT / name).exists():
            return name  # mkdocs names it
        return known

    return rewritten(_repository_name(page.file), markdown, where)


def on_post_page(output: str, **_: Any) -> str:
    """Puts our few lines in the place of the script that the theme loads from a network."""
    own = Path(__file__).with_name("worker.js").read_text(encoding="utf-8")
    return SHIM.sub(lambda _: f"<script>{own}</script>", output, count=1)


def on_post_template(output_content: str, **_: Any) -> str:
    """Does the same to the page of what is not found."""
    return on_post_page(output_content)
