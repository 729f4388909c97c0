"""Plots as inline SVG, drawn here: 360 units wide, near one unit a CSS pixel, so that text stays readable on a phone.

Colours and fonts come from the page's style through class names (s0, s1, ...: one a series; `ref`: what is compared
against). Every mark has a <title>, which browsers show on hover and screen readers read.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from edgelora.report.figures import known, number
from edgelora.report.markup import Markup, join, tag

WIDTH = 360
_MOST_POINTS = 400  # of a curve; more cannot be told apart at this width
MOST_ROWS = 60
_FURTHEST = 2.0  # times the longest bar: samples beyond are not drawn
_TINY = 1e-12  # spans and values below it are drawn as nothing


@dataclass(frozen=True)
class Axis:
    """Maps values low..high onto coordinates start..end, linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, most: int) -> list[float]:
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [s * 10.0**p for p in powers for s in steps if self.low * 0.999 <= s * 10.0**p <= self.high * 1.001]
                if len(found) <= most:
                    return found
            return found[:: math.ceil(len(found) / most)]
        step = _step(self.high - self.low, most)
        first, last = math.ceil(self.low / step - 1e-6), math.floor(self.high / step + 1e-6)
        return [i * step for i in range(first, last + 1)]


def axis(values: Sequence[float], start: float, end: float, *, zero: bool = False, log: bool = False, most: int = 5) -> Axis:
    """An axis that holds all `values`, widened to round numbers. Logarithmic only where every value is above 0."""
    low, high = min(values), max(values)
    if log and low > _TINY:
        return Axis(low / 1.3, high * 1.3, start, end, log=True)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < max(1e-9 * max(abs(low), abs(high)), _TINY):
        room = abs(high) * 0.1 if abs(high) > 1e3 * _TINY else 1.0
        low, high = (low if zero and low == 0 else low - room), high + room
    step = _step(high - low, most)
    return Axis(math.floor(low / step + 1e-6) * step, math.ceil(high / step - 1e-6) * step, start, end)


def close(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis that ends a little outside of the values, wherever that is: for points, whose labels want the room."""
    wide = axis(values, start, end)
    room = (max(values) - min(values)) * 0.05
    return Axis(min(values) - room, max(values) + room, start, end) if room > (wide.high - wide.low) * 1e-6 else wide


def curves(series: Sequence[tuple[str, Sequence[tuple[float, float]]]], x_label: str, y_label: str, at: str = "step") -> Markup:
    """Lines over steps (or what `at` names); of a training's, the later series have dots and the lowest point of the last is named."""
    height, left, right, top, bottom = 240, 46, 348, 30, 200
    series = [(name, thinned(points)) for name, points in series if points]
    everything = [p for _, points in series for p in points]
    x = axis([p[0] for p in everything], left, right)
    y = axis([p[1] for p in everything], bottom, top)
    marks = [
        _text(left - 40, 14, y_label, "axis"),
        *_grid_y(y, left, right),
        *_ticks_x(x, bottom),
        _text(right, height - 6, x_label, "axis end"),
    ]
    for i, (name, points) in enumerate(series):
        path = " ".join(f"{x.at(px)},{y.at(py)}" for px, py in points)
        marks.append(tag("polyline", points=path, class_=f"line s{i}"))
        if i or len(points) == 1 or at != "step":
            marks += [_dot(x.at(px), y.at(py), f"s{i}", f"{name}: {py:.3f} at {at} {px:g}", 3) for px, py in points]
    if len(series) > 1 and at == "step":
        marks += _lowest(series[-1], x, y, left, right, f"s{len(series) - 1}")
    return _svg(height, f"{y_label} over {x_label}", marks)


@dataclass(frozen=True)
class Bar:
    """One bar: a label and a figure above it. `samples` are ticks on it, `expected` is a dashed line."""

    label: str
    value: float
    figure: str
    series: str
    samples: Sequence[float] = ()
    expected: float | None = None
    hint: str = ""


def bars(rows: Sequence[Bar], description: str) -> Markup:
    """Bars from zero under their labels, longest label cut in its middle; no axis: every bar bears its figure.

    A sample far beyond every bar (a machine that slept) is left out: it would press all of them flat.
    """
    rows = rows[:MOST_ROWS]
    most = _FURTHEST * max(abs(row.value) for row in rows)
    rows = [replace(row, samples=[s for s in row.samples if abs(s) <= most]) for row in rows]
    scale = axis([v for row in rows for v in (row.value, row.expected or 0.0, *row.samples)], 0, WIDTH - 2, zero=True, most=40)
    marks: list[Markup] = []
    for i, row in enumerate(rows):
        base = i * 40
        start, end = sorted((scale.at(0), scale.at(row.value)))
        room = WIDTH - text_width(row.figure, 13) - 14
        marks.append(_text(0, base + 14, shortened(row.label, room), "label", row.label))
        marks.append(_text(WIDTH, base + 14, row.figure, "figure end"))
        marks.append(tag("rect", x=0, y=base + 21, width=WIDTH, height=10, rx=2, class_="track"))
        marks.append(
            tag(
                "rect",
                tag("title", row.hint or f"{row.label}: {row.figure}"),
                x=start,
                y=base + 21,
                width=max(1.5, round(end - start, 1)),
                height=10,
                rx=2,
                class_=f"fill {row.series}",
            )
        )
        marks += [tag("line", x1=scale.at(s), x2=scale.at(s), y1=base + 22, y2=base + 30, class_="sample") for s in row.samples[:50]]
        if row.expected is not None:
            at = scale.at(row.expected)
            marks.append(tag("line", tag("title", "predicted"), x1=at, x2=at, y1=base + 19, y2=base + 34, class_="expected"))
    return _svg(len(rows) * 40 - 2, description, marks)


@dataclass(frozen=True)
class Stack:
    """One bar made of parts: (bytes or whatever, class name, hint) in order."""

    label: str
    figure: str
    parts: Sequence[tuple[float, str, str]]


def stacks(rows: Sequence[Stack], description: str) -> Markup:
    """Bars from zero, all on one scale, each cut into its parts."""
    rows = rows[:MOST_ROWS]
    scale = Axis(0, max(sum(part[0] for part in row.parts) for row in rows) or 1, 0, WIDTH)
    marks: list[Markup] = []
    for i, row in enumerate(rows):
        base, at = i * 44, 0.0
        marks.append(_text(0, base + 14, shortened(row.label, WIDTH - text_width(row.figure, 13) - 14), "label", row.label))
        marks.append(_text(WIDTH, base + 14, row.figure, "figure end"))
        for value, series, hint in row.parts:
            start, at = scale.at(at), at + value
            width = max(0.0, round(scale.at(at) - start, 1))
            marks.append(tag("rect", tag("title", hint), x=start, y=base + 21, width=width, height=14, class_=f"fill part {series}"))
    return _svg(len(rows) * 44 - 4, description, marks)


Measure = tuple[float, float | None, float | None]  # a value and its interval's ends, which may be missing


@dataclass(frozen=True)
class Pair:
    """A measure before and after."""

    label: str
    change: str
    before: Measure | None
    after: Measure | None
    series: str


def pairs(rows: Sequence[Pair], x_label: str, show: Callable[[float], str]) -> Markup:
    """Before and after on one axis, a row a pair: dots, intervals as thick lines, the change in words at the right."""
    rows = rows[:MOST_ROWS]
    left, right = 12, WIDTH - 12
    bottom = len(rows) * 46 + 2
    shown = [m for row in rows for m in (row.before, row.after) if m]
    x = axis([v for m in shown for v in m if known(v)], left, right, most=6)
    marks = [tag("line", x1=x.at(t), x2=x.at(t), y1=0, y2=bottom, class_="grid") for t in x.ticks(6)]
    for i, row in enumerate(rows):
        middle = i * 46 + 31
        room = WIDTH - text_width(row.change, 13) - 14
        marks.append(_text(0, i * 46 + 16, shortened(row.label, room), "label halo", row.label))
        marks.append(_text(WIDTH, i * 46 + 16, row.change, "figure end halo"))
        if row.before and row.after:
            marks.append(tag("line", x1=x.at(row.before[0]), x2=x.at(row.after[0]), y1=middle, y2=middle, class_="link"))
        for measure, series, name in ((row.before, "ref", "before"), (row.after, row.series, "after")):
            if measure:
                value, low, high = measure
                if known(low) and known(high):
                    marks.append(tag("line", x1=x.at(low), x2=x.at(high), y1=middle, y2=middle, class_=f"interval {series}"))
                marks.append(_dot(x.at(value), middle, series, f"{row.label}, {name}: {show(value)}", 5))
    marks += [*_ticks_x(x, bottom - 4, 6), _text(right + 12, bottom + 30, x_label, "axis end")]
    return _svg(bottom + 36, f"before and after, {x_label}", marks)


@dataclass(frozen=True)
class Point:
    label: str
    x: float
    y: float
    low: float | None
    high: float | None
    series: str
    hint: str
    file: str | None = None
    out: str = ""  # why the point does not count: drawn as a cross


def scatter(points: Sequence[Point], x_label: str, y_label: str, front: Sequence[Point] = ()) -> Markup:
    """Labelled points with vertical intervals. The vertical axis is logarithmic where values span more than 12 times.

    `front` are those of the points to join by a line, left to right.
    """
    points = points[:MOST_ROWS]
    height, left, right, top, bottom = 272, 46, 348, 46, 228
    x = close([p.x for p in points], left + 36, right - 14)
    values = [v for p in points for v in (p.y, p.low, p.high) if known(v)]
    # a logarithm where a linear axis would press most points onto zero
    wide = min(values) > _TINY and max(values) > 12 * min(values)
    y = axis(values, bottom, top, zero=not wide, log=wide)
    marks = [_text(left - 40, 14, y_label + (" (log scale)" if wide else ""), "axis"), *_grid_y(y, left, right)]
    marks += [
        tag("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="base"),
        *_ticks_x(x, bottom),
        _text(right, height - 6, x_label, "axis end"),
    ]
    front = [p for p in front if p in points]
    if len(front) > 1:
        marks.append(tag("polyline", points=" ".join(f"{x.at(p.x)},{y.at(p.y)}" for p in front), class_="frontier"))
    taken = [(x.at(p.x) - 6, y.at(p.y) - 6, x.at(p.x) + 6, y.at(p.y) + 6) for p in points]
    line = [box for a, b in pairwise(front) for box in _along((x.at(a.x), y.at(a.y)), (x.at(b.x), y.at(b.y)))]
    for p in points:
        px, py = x.at(p.x), y.at(p.y)
        if known(p.low) and known(p.high):
            marks.append(tag("line", x1=px, x2=px, y1=y.at(p.low), y2=y.at(p.high), class_=f"interval thin {p.series}"))
        marks.append(_cross(px, py, p.series, p.hint) if p.out else _dot(px, py, p.series, p.hint, 5))
    waiting = sorted(points, key=lambda p: p.x)
    # labels beside their points first, then those that need a leader, last those that cannot keep clear of the front
    for away, clear_of in ((9, line), (20, line), (9, []), (32, [])):
        found = {id(p): _placed(p, x.at(p.x), y.at(p.y), away, taken, clear_of, (left, 20, WIDTH, bottom - 2)) for p in waiting}
        marks += [mark for p in waiting for mark in found[id(p)]]
        waiting = [p for p in waiting if not found[id(p)]]
    return _svg(height, f"{y_label} against {x_label}", marks)


def text_width(text: str, size: float) -> float:
    """A safe guess in user units: wide letters of East Asia are as wide as high, others 0.58 of it."""
    return sum(1.0 if unicodedata.east_asian_width(c) in "WF" else 0.58 for c in text) * size


def shortened(text: str, room: float, size: float = 13) -> str:
    """`text` with its middle replaced by an ellipsis where it would be wider than `room`."""
    if text_width(text, size) <= room:
        return text
    text = text[:200]
    keep = len(text)
    while keep > 4 and text_width(text[: keep // 2] + "…" + text[-(keep - keep // 2) :], size) > room:
        keep -= 1
    return text[: keep // 2] + "…" + text[-(keep - keep // 2) :]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 400 points: of each stretch its lowest and highest, in order, so that no spike is lost."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    stretch = math.ceil(len(points) / (_MOST_POINTS // 2))
    kept: list[tuple[float, float]] = []
    for i in range(0, len(points), stretch):
        part = range(i, min(i + stretch, len(points)))
        ends = {min(part, key=lambda j: points[j][1]), max(part, key=lambda j: points[j][1])}
        kept += [points[j] for j in sorted(ends)]
    return kept


def _lowest(series: tuple[str, Sequence[tuple[float, float]]], x: Axis, y: Axis, left: float, right: float, style: str) -> list[Markup]:
    """Name the lowest point, below it, kept inside the frame."""
    step, value = min(series[1], key=lambda p: p[1])
    words = f"best {value:.3f}"
    half = text_width(words, 12) / 2
    at = min(max(x.at(step), left + half), right - half)
    return [
        _dot(x.at(step), y.at(value), style, f"{series[0]}: {words} at step {step:g}", 4.5),
        _text(at, y.at(value) - 10, words, f"label middle halo {style}"),
    ]


_Box = tuple[float, float, float, float]  # left, top, right, bottom


def _along(a: tuple[float, float], b: tuple[float, float]) -> list[_Box]:
    """Small boxes on the way from a to b, which a label beside either end may touch."""
    length = math.hypot(b[0] - a[0], b[1] - a[1])
    shares = [at / length for at in range(14, int(length) - 13, 6)]
    return [(x - 2, y - 2, x + 2, y + 2) for x, y in ((a[0] + s * (b[0] - a[0]), a[1] + s * (b[1] - a[1])) for s in shares)]


def _placed(p: Point, px: float, py: float, away: int, taken: list[_Box], clear_of: Sequence[_Box], frame: _Box) -> list[Markup]:
    """The label of the point at (px, py) in a free place `away` from it, which is then taken; nothing when none is free.

    A label that is not beside its point gets a leader, which keeps clear of others too, or it would seem to end there.
    """
    label = shortened(p.label, 165, 12)
    wide = text_width(label, 12)
    others = [t for t in taken if not (t[0] < px < t[2] and t[1] < py < t[3])]
    for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)):
        x = px + (dx * away if dx > 0 else dx * away - wide if dx < 0 else -wide / 2)
        middle = py + dy * (away + 4)
        box = (x, middle - 7, x + wide, middle + 7)
        inside = box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
        free = not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in (*taken, *clear_of))
        way = [(px + dx * away * s, py + (middle - py) * s) for s in (0.4, 0.6, 0.8, 1.0)] if away > 9 else []
        if inside and free and not any(t[0] < wx < t[2] and t[1] < wy < t[3] for wx, wy in way for t in others):
            taken.append(box)
            leader = [tag("line", x1=px, y1=py, x2=round(px + dx * away, 1), y2=round(middle, 1), class_="leader")] if way else []
            return [*leader, _text(round(x, 1), round(middle + 4, 1), label, "label small halo", p.hint)]
    return []


def _grid_y(y: Axis, left: float, right: float) -> list[Markup]:
    marks = []
    ticks = y.ticks(5)
    for tick, words in zip(ticks, _tick_texts(ticks, y.log), strict=True):
        marks.append(tag("line", x1=left, x2=right, y1=y.at(tick), y2=y.at(tick), class_="grid"))
        marks.append(_text(left - 6, y.at(tick) + 4, words, "tick end"))
    return marks


def _ticks_x(x: Axis, bottom: float, most: int = 5) -> list[Markup]:
    ticks = x.ticks(most)
    return [_text(x.at(tick), bottom + 17, words, "tick middle") for tick, words in zip(ticks, _tick_texts(ticks, x.log), strict=True)]


def _tick_texts(ticks: Sequence[float], log: bool) -> list[str]:
    if log or len(ticks) < 2:
        return [number(tick, 1 if log else 3) for tick in ticks]
    digits = max(0, -math.floor(math.log10(abs(ticks[1] - ticks[0])) + 1e-6))
    return [f"{tick + 0.0:,.{digits}f}".replace("-", "\u2212") for tick in ticks]


def _step(span: float, most: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that goes into `span` at most `most` times."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next((power * m for m in (1, 2, 5) if power * m * most >= span * 0.999999), power * 10)


def _dot(x: float, y: float, series: str, hint: str, radius: float) -> Markup:
    return tag("circle", tag("title", hint), cx=x, cy=y, r=radius, class_=f"dot {series}")


def _cross(x: float, y: float, series: str, hint: str) -> Markup:
    return tag("path", tag("title", hint), d=f"M{x - 4.5},{y - 4.5}l9,9m0,-9l-9,9", class_=f"cross {series}")


def _text(x: float, y: float, text: str, style: str, full: str | None = None) -> Markup:
    title = tag("title", full) if full and full != text else None
    return tag("text", text, title, x=x, y=y, class_=style)


def _svg(height: float, description: str, marks: Sequence[Markup]) -> Markup:
    return tag("svg", tag("title", description), join(marks), viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=description)
