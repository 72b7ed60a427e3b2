"""The idea of each method as a picture: ways from noise to data, and what a method does on them.

The ways are those of an exact teacher, a flow from a Gaussian to a mixture of two Gaussians. What
happens on them stands in `pictures.yaml`, one line a mark.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

FILE = Path(__file__).with_name("pictures.yaml")
WIDTH, HEIGHT, LEFT, RIGHT = 640, 250, 60, 560
MODES, SPREAD = np.array([-1.0, 1.0]), 0.22
STARTS = (-1.7, -0.75, -0.2, 0.35, 1.1)
TIMES = np.linspace(1, 0, 101)
Point = tuple[float, float]


@cache
def ways() -> np.ndarray:
    """x at each of `TIMES` for each of `STARTS`, [time, way], by Heun's method."""
    x = np.array(STARTS)
    found = [x]
    for t, s in pairwise(TIMES):
        v = velocity(x, t)
        x = x + (s - t) * (v + velocity(x + (s - t) * v, s)) / 2
        found.append(x)
    return np.array(found)


def velocity(x: np.ndarray, t: float) -> np.ndarray:
    """E[eps - x_0 | x_t = x] for x_t = (1 - t) x_0 + t eps, exactly."""
    variance = ((1 - t) * SPREAD) ** 2 + t**2
    off = x[:, None] - (1 - t) * MODES
    weight = np.exp(-(off**2) / (2 * variance))
    weight /= weight.sum(1, keepdims=True)
    x_0 = (weight * (MODES + (1 - t) * SPREAD**2 / variance * off)).sum(1)
    return (x - x_0) / max(t, 1e-3) if t > 0 else np.zeros_like(x)


def place(t: float, x: float) -> Point:
    """A time and a value as a place in the picture."""
    return LEFT + (1 - t) * (RIGHT - LEFT), 122 - 44 * x


def on(way: int, t: float) -> Point:
    """The place of a way at a time."""
    return place(t, float(np.interp(1 - t, 1 - TIMES, ways()[:, way])))


def line(points: Sequence[Point], kind: str, arrow: bool = False) -> str:
    """A line through points."""
    path = "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<path class="{kind}" d="{path}"{_arrow(kind) if arrow else ""}/>'


def arc(a: Point, b: Point, kind: str, bend: float) -> str:
    """An arrow from a to b, bent upwards by a part of its length."""
    middle = ((a[0] + b[0]) / 2, (a[1] + b[1]) / 2 - bend * abs(a[0] - b[0]))
    path = f"M{a[0]:.1f},{a[1]:.1f} Q{middle[0]:.1f},{middle[1]:.1f} {b[0]:.1f},{b[1]:.1f}"
    return f'<path class="{kind}" d="{path}"{_arrow(kind)}/>'


def _arrow(kind: str) -> str:
    return f' marker-end="url(#arrow-{kind.split()[-1]})"'


def dot(point: Point, kind: str) -> str:
    return f'<circle class="dot {kind}" cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="4.5"/>'


def words(point: Point, text: str, anchor: str = "middle") -> str:
    x, y = point
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def mark(what: dict[str, Any]) -> str:
    """One mark of a picture; `way` says on which way (the middle one by default)."""
    (name,) = set(what) & set(MARKS)
    options = {key: value for key, value in what.items() if key != name}
    return MARKS[name](what[name], **options)


def solve(times: Sequence[float], way: int = 3) -> str:
    """The teacher's steps along its way."""
    inside = [t for t in TIMES if min(times) < t < max(times)]
    shown = line([on(way, t) for t in (max(times), *inside, min(times))], "way teacher")
    return shown + "".join(dot(on(way, t), "teacher") for t in times)


def jump(times: Sequence[float], way: int = 3, by: str = "student", bend: float = 0.28) -> str:
    """Jumps from each time to the next, on one way."""
    return "".join(
        arc(on(way, a), on(way, b), f"way {by}", bend) for a, b in pairwise(times)
    ) + "".join(dot(on(way, t), by) for t in times)


def straight(times: Sequence[float], way: int = 3, by: str = "target") -> str:
    """A straight line between the ends of a way, from one of its times to another."""
    noise, data = on(way, 1), on(way, 0)

    def at(t: float) -> Point:
        return noise[0] * t + data[0] * (1 - t), noise[1] * t + data[1] * (1 - t)

    return line([at(times[0]), at(times[-1])], f"way {by}", arrow=True) + "".join(
        dot(at(t), by) for t in times
    )


def see(times: Sequence[float], way: int = 3) -> str:
    """The last of the times sees the others."""
    *earlier, last = times
    return "".join(arc(on(way, t), on(way, last), "way seen", -0.3) for t in earlier)


def tangent(time: float, way: int = 3, by: str = "target") -> str:
    """The direction of a way at a time."""
    (x, y), (ahead_x, ahead_y) = on(way, time), on(way, time - 0.02)
    long = 16 * (ahead_x - x), 16 * (ahead_y - y)
    return line([(x, y), (x + long[0], y + long[1])], f"way {by}", arrow=True)


def renoise(to: float, way: int = 3, shift: float = 0.5) -> str:
    """Fresh noise from the end of a way back to a time, `shift` away from the way."""
    end = on(way, to)
    return arc(on(way, 0), (end[0], end[1] - 44 * shift), "way noise", 0.2)


def equal(time: float, ways: Sequence[int] = (3, 3), text: str = "equal?") -> str:
    """Two ends that a loss compares at a time."""
    x, y = on(ways[0], time)
    return f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="10"/>' + words((x, y - 16), text)


def judge(text: str, sees: Sequence[int] = (1, 3)) -> str:
    """A network that looks at the ends of ways."""
    box = f'<rect class="box" x="{RIGHT - 50}" y="6" width="120" height="26" rx="5"/>'
    looks = [line([on(way, 0), (RIGHT + 10, 34)], "way judge") for way in sees]
    return box + "".join(looks) + words((RIGHT + 10, 24), text)


def note(text: str, at: float, x: float = -2.05) -> str:
    """Words at a time and a value."""
    return words(place(at, x), text)


MARKS = {
    made.__name__: made
    for made in (solve, jump, straight, see, tangent, renoise, equal, judge, note)
}


def background() -> str:
    """All ways, and the distributions at both ends."""
    grey = "".join(line([on(way, t) for t in TIMES[::4]], "way grey") for way in range(len(STARTS)))
    x = np.linspace(-2.4, 2.4, 61)
    noise = np.exp(-(x**2) / 2)
    data = np.exp(-((x[:, None] - MODES) ** 2) / (2 * SPREAD**2)).sum(1)
    left = [(LEFT - 34 * float(p), place(1, v)[1]) for v, p in zip(x, noise, strict=True)]
    right = [(RIGHT + 34 * float(p), place(0, v)[1]) for v, p in zip(x, data, strict=True)]
    ends = line(left, "density") + line(right, "density")
    labels = words((LEFT, HEIGHT - 6), "noise, t = 1", "start")
    return grey + ends + labels + words((RIGHT, HEIGHT - 6), "data, t = 0", "end")


def arrowheads() -> str:
    return "".join(
        f'<marker id="arrow-{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" '
        f'markerHeight="5" orient="auto"><path class="head {kind}" d="M0,0 L8,4 L0,8 z"/></marker>'
        for kind in ("student", "target", "noise", "seen", "fake", "teacher")
    )


@cache
def captions() -> dict[str, dict[str, Any]]:
    """What `pictures.yaml` says, by method."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return found


def picture(method: str) -> str:
    """A method's picture with its caption, as HTML; empty for a method without one."""
    if method not in captions():
        return ""
    said = captions()[method]
    marks = "".join(mark(each) for each in said["marks"])
    caption = html.escape(said["caption"])
    return (
        f'<figure class="idea"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{caption}"><defs>{arrowheads()}</defs>{background()}{marks}</svg>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
