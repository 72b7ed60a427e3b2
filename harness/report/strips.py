"""Strips: the first samples of each best row, all from the same noise and labels.

They are cut from the rows' grids. A run's grid has two rows of squares with white frames: the upper
one is the run's, the lower one the task's reference (`harness.runs.evaluation.write_grid`).
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from harness.asides import write_aside
from harness.data.readers import open_picture
from harness.files import inside
from harness.report.best import OWN, Best
from harness.report.labels import counted
from harness.report.rows import Row
from harness.report.task_report import TaskReport

COUNT = 8
"""Samples of a strip."""
SAMPLES = f"The first {COUNT} samples of each row, from the same noise and labels (noise set 0)."
LEGIBLE, LARGEST = 88, 176
"""Pixels of a sample's square with its frame: smaller ones are enlarged, larger ones shrunk."""
NAMES, LETTERS, LINE = 250, 27, 20
"""Pixels of the column of names, letters of its lines, and pixels from line to line."""
APART = 12
"""Pixels between numbers of steps."""


@dataclass(frozen=True)
class Strip:
    """The first samples of a best row.

    Attributes:
        picture: they stand side by side, or None where no grid can be cut.
    """

    best: Best
    picture: Image.Image | None

    @property
    def png(self) -> bytes:
        """The picture as a file; empty without one."""
        content = BytesIO()
        if self.picture:
            self.picture.save(content, "png", optimize=True)
        return content.getvalue()

    @property
    def caption(self) -> str:
        """What it shows, such as "The first 8 samples of ect, 1 step, from noise set 0"."""
        count = self.picture.width // self.picture.height if self.picture else 0
        return f"The first {counted(count, 'sample')} of {self.best.title}, from noise set 0"


def strips_of(report: TaskReport, results: Path) -> list[Strip]:
    """A strip for each line of the best table.

    The teacher's own output is the reference, so the lower row of any grid shows it.

    Args:
        results: the results folder, where the grids lie.
    """
    grids = [_grid(grid_file(best.row, report.task, results)) for best in report.best]
    reference = next((_cut(grid, lower=True) for grid in grids if grid), None)
    return [
        Strip(best, reference if best.name == OWN else _cut(grid) if grid else None)
        for best, grid in zip(report.best, grids, strict=True)
    ]


def grid_file(row: Row, task: str, results: Path) -> Path | None:
    """The grid of a row's first seed, of its run or published; None where there is none.

    Raises UsageError for a link that leads out of the results folder.
    """
    if not row.finished:
        return None
    run_id = row.finished[0].run_id
    places = (
        results / "runs" / run_id / "samples.png",
        results / task / "samples" / f"{run_id}.png",
    )
    found = next((place for place in places if place.is_file()), None)
    return inside(found, results) if found else None


def _grid(file: Path | None) -> Image.Image | None:
    """A grid; None without a file, and for one that is broken or has no two rows of squares."""
    if file is None:
        return None
    try:
        with open_picture(file) as image:
            grid = image.convert("RGB")
    except Exception:  # Pillow's decoders raise anything on broken files
        return None
    square, odd = divmod(grid.height, 2)
    return grid if square and not odd and not grid.width % square else None


def _cut(grid: Image.Image, lower: bool = False) -> Image.Image:
    """The first samples of a grid's upper or lower row; squares above `LARGEST` are shrunk."""
    square = grid.height // 2
    width, top = min(COUNT * square, grid.width), square * lower
    strip = grid.crop((0, top, width, top + square))
    if square <= LARGEST:
        return strip
    return strip.resize((width // square * LARGEST, LARGEST), Image.Resampling.BOX)


def lacking(strips: Sequence[Strip]) -> str:
    """A sentence that names the rows without a strip; empty if each has one."""
    names = "; ".join(strip.best.title for strip in strips if not strip.picture)
    return f"No samples that can be shown here are published for: {names}." if names else ""


def alternative(strips: Sequence[Strip]) -> str:
    """What the stacked strips show, in words."""
    names = "; ".join(strip.best.title for strip in strips if strip.picture)
    return f"The first {COUNT} samples of the best rows, each strip from the same noise: {names}"


def write_strips(strips: Sequence[Strip], file: Path) -> None:
    """Writes the strips one below the other, with names; without any the file is deleted."""
    if not any(strip.picture for strip in strips):
        file.unlink(missing_ok=True)
        return
    write_aside(file, partial(stacked(strips).save, format="png", optimize=True))


def stacked(strips: Sequence[Strip]) -> Image.Image:
    """The strips one below the other, each with its number of steps, kind and name at its left.

    Pixels of small samples are enlarged by a whole number.
    """
    shown = [(strip.best, _legible(strip.picture)) for strip in strips if strip.picture]
    names = [_name(best) for best, _ in shown]
    heights = [
        max(picture.height, LINE * len(lines))
        for (_, picture), lines in zip(shown, names, strict=True)
    ]
    steps = [best.row.num_steps for best, _ in shown]
    gaps = [APART * (now != before) for before, now in zip([steps[0], *steps], steps, strict=False)]
    width = NAMES + max(picture.width for _, picture in shown)
    whole = Image.new("RGB", (width, sum(heights) + sum(gaps)), "white")
    draw, font, top = ImageDraw.Draw(whole), _font(), 0
    for (_, picture), lines, height, gap in zip(shown, names, heights, gaps, strict=True):
        top += gap
        whole.paste(picture, (NAMES, top))
        first = top + (height - LINE * len(lines)) // 2
        for number, line in enumerate(lines):
            ink = "#535c6d" if number == 0 else "black"
            draw.text((4, first + LINE * number), line, fill=ink, font=font)
        top += height
    return whole


def _legible(picture: Image.Image) -> Image.Image:
    times = max(1, LEGIBLE // picture.height)
    return picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)


def _name(best: Best) -> list[str]:
    """The lines at a strip's left."""
    return [
        f"{counted(best.row.num_steps)}, {best.kind}",
        *textwrap.wrap(best.name, LETTERS, break_on_hyphens=False),
    ]


def _font() -> ImageFont.FreeTypeFont:
    """The font of the plots."""
    import matplotlib  # takes a while to import

    file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(file), 15, layout_engine=ImageFont.Layout.BASIC)
