"""Charts as inline SVG: no library, no network, colours from the page's CSS variables, so light, dark and print need one drawing.

A chart takes a width in CSS pixels, and is drawn once for desks and once for phones; text keeps its size in both. Marks carry their
figures in `data-tip` (the page's script shows it) and in `aria-label` (screen readers say it).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup

WIDE, NARROW = 1100, 350
CHARACTER = 6.6  # mean advance of a 12 px sans-serif character in px; for spacing only
FEW = 8  # values on an axis that all have room for a tick
COLOURS = 8  # --c0 … --c7 of the page
SHAPES = 6


class Scale:
    """Maps data to pixels; logarithmic if the data span more than a factor of `log_from`."""

    def __init__(self, values: Iterable[float], start: float, end: float, *, margin: float = 0.06, zero: bool = False, log_from: float | None = None) -> None:
        known = list(values) or [0.0, 1.0]
        low, high = min(known), max(known)
        self.log = log_from is not None and low > 0 and high / low > log_from
        if zero and not self.log:
            low, high = min(0.0, low), max(0.0, high)
        if self.log:
            low, high = math.log10(low), math.log10(high)
        pad = (high - low) * margin or abs(high) * 0.1 or 1.0
        self.low, self.high = (low if zero and low == 0 and not self.log else low - pad), high + pad
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        position = math.log10(value) if self.log else value
        return self.start + (position - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Round values inside the range: 1-2-5 steps, or 1-2-5 per decade if logarithmic."""
        if self.log:
            decades = range(math.floor(self.low) - 1, math.ceil(self.high) + 1)
            found = [m * 10.0**d for d in decades for m in (1, 2, 5)]
            inside = [v for v in found if self.low <= math.log10(v) <= self.high]
            return inside if len(inside) <= about + 2 else [v for v in inside if math.isclose(math.log10(v) % 1, 0, abs_tol=1e-9)] or inside
        raw = (self.high - self.low) / max(about, 1)
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def tick_label(value: float) -> str:
    """A round value without trailing zeros."""
    return f"{value:g}"


def text(x: float, y: float, content: str, *, anchor: str = "start", css: str = "") -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}" class="{}">{}</text>').format(f"{x:.1f}", f"{y:.1f}", anchor, css, content)


def line(x1: float, y1: float, x2: float, y2: float, css: str = "grid") -> Markup:
    return Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>').format(f"{x1:.1f}", f"{y1:.1f}", f"{x2:.1f}", f"{y2:.1f}", css)


def rectangle(x: float, y: float, width: float, height: float, *, css: str, tip: str = "") -> Markup:
    mark = Markup('<rect x="{}" y="{}" width="{}" height="{}" rx="1.5" class="{}"{}/>')
    return mark.format(f"{x:.1f}", f"{y:.1f}", f"{max(width, 0.8):.1f}", f"{height:.1f}", css, _tip(tip))


def path(points: Sequence[tuple[float, float]], css: str) -> Markup:
    return Markup('<polyline points="{}" class="{}"/>').format(" ".join(f"{x:.1f},{y:.1f}" for x, y in points), css)


def _tip(tip: str) -> Markup:
    return Markup(' data-tip="{}" tabindex="0" role="img" aria-label="{}"').format(tip, tip.replace("\n", ", ")) if tip else Markup("")


def marker(x: float, y: float, shape: int, css: str, *, tip: str = "", radius: float = 5.5) -> Markup:
    """A symbol: circle, square, triangle, diamond, cross, inverted triangle."""
    r = radius
    if shape % SHAPES == 0:
        return Markup('<circle cx="{}" cy="{}" r="{}" class="{}"{}/>').format(f"{x:.1f}", f"{y:.1f}", r, css, _tip(tip))
    outlines = (
        [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
        [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        [(-1, -0.4), (-0.4, -0.4), (-0.4, -1), (0.4, -1), (0.4, -0.4), (1, -0.4), (1, 0.4), (0.4, 0.4), (0.4, 1), (-0.4, 1), (-0.4, 0.4), (-1, 0.4)],
        [(0, 1.15), (1.1, -0.85), (-1.1, -0.85)],
    )
    points = " ".join(f"{x + dx * r:.1f},{y + dy * r:.1f}" for dx, dy in outlines[shape % SHAPES - 1])
    return Markup('<polygon points="{}" class="{}"{}/>').format(points, css, _tip(tip))


def svg(width: float, height: float, label: str, parts: Iterable[Markup]) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {}" width="{}" height="{}" role="group" aria-label="{}">').format(
        f"{width:.0f}", f"{height:.0f}", f"{width:.0f}", f"{height:.0f}", label
    )
    return head + Markup("").join(parts) + Markup("</svg>")


def responsive(draw: Callable[[float], Markup]) -> Markup:
    """The chart for desks and for phones; CSS shows one of them."""
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(draw(WIDE), draw(NARROW))


def legend(entries: Sequence[tuple[str, Markup]]) -> Markup:
    """Names beside their symbols, as HTML that wraps."""
    item = Markup('<li><svg width="16" height="16" viewBox="0 0 16 16" aria-hidden="true">{}</svg>{}</li>')
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(item.format(symbol, name) for name, symbol in entries))


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def hits(self, other: _Box) -> bool:
        return self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom


class Point(NamedTuple):
    """A point of a scatter. `label` is written beside it where there is room; `front`: on the Pareto line."""

    x: float
    y: float
    colour: int
    shape: int
    label: str
    tip: str
    front: bool
    chosen: bool = False


def pareto(points: Sequence[tuple[float, float]], *, higher_y: bool = True) -> list[int]:
    """Indices of the points that no other beats in both x (lower is better) and y, by rising x."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1] if higher_y else points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or (points[i][1] > points[front[-1]][1] if higher_y else points[i][1] < points[front[-1]][1]):
            front.append(i)
    return front


def _place(x: float, y: float, point: Point, taken: list[_Box], frame: _Box) -> tuple[float, float, str] | None:
    """Where a label beside (x, y) hits nothing: (x, y, anchor); None if nowhere."""
    width, away = len(point.label) * CHARACTER, 6 if point.chosen else 0
    side, up, down = 10 + away, -11 - away, 20 + away
    beside = ((side, 4, "start"), (-side, 4, "end"), (0, up, "middle"), (0, down, "middle"))
    corners = ((8, up, "start"), (-8, up, "end"), (8, down, "start"), (-8, down, "end"))
    for dx, dy, anchor in (*beside, *corners):
        left = x + dx - {"start": 0, "middle": width / 2, "end": width}[anchor]
        box = _Box(left, y + dy - 11, left + width, y + dy + 4)
        inside = box.left >= frame.left and box.right <= frame.right and box.top >= frame.top and box.bottom <= frame.bottom
        if inside and not any(box.hits(other) for other in taken):
            taken.append(box)
            return x + dx, y + dy, anchor
    return None


def scatter(points: Sequence[Point], width: float, *, x_title: str, y_title: str, show_y: Callable[[float], str], label: str) -> Markup:
    """Points with a Pareto line; x is logarithmic if it spans more than a factor of ten."""
    height = 420.0 if width > 500 else 340.0
    left, right, top, bottom = 62.0, 14.0, 26.0, 46.0
    x = Scale([p.x for p in points], left, width - right, log_from=10)
    y = Scale([p.y for p in points], height - bottom, top, margin=0.14)
    parts = [*_axes(x, y, (width, height), (left, right, top, bottom), show_x=tick_label, show_y=show_y)]
    parts += [text(width - right, height - 6, x_title + (" (logarithmic)" if x.log else ""), anchor="end", css="axis"), text(4, 13, y_title, css="axis")]
    front = sorted((p for p in points if p.front), key=lambda p: p.x)
    if len(front) > 1:
        corners = [(x(front[0].x), y(front[0].y))]
        for before, after in itertools.pairwise(front):
            corners += [(x(after.x), y(before.y)), (x(after.x), y(after.y))]
        parts.append(path(corners, "pareto"))
    taken = [_Box(x(p.x) - r, y(p.y) - r, x(p.x) + r, y(p.y) + r) for p in points for r in (13.0 if p.chosen else 7.0,)]
    taken += [_Box(x(before.x), y(before.y) - 2, x(after.x), y(before.y) + 2) for before, after in itertools.pairwise(front)]
    frame = _Box(left, top - 10, width, height - bottom)
    for p in points:
        if p.chosen:
            parts.append(Markup('<circle cx="{}" cy="{}" r="11" class="chosen"/>').format(f"{x(p.x):.1f}", f"{y(p.y):.1f}"))
        parts.append(marker(x(p.x), y(p.y), p.shape, f"mark f{p.colour % COLOURS}", tip=p.tip))
    for p in sorted(points, key=lambda p: (not p.chosen, not p.front, p.x)):
        place = _place(x(p.x), y(p.y), p, taken, frame)
        if place:
            parts.append(text(place[0], place[1], p.label, anchor=place[2], css="label" + (" strong" if p.chosen else "")))
    return svg(width, height, label, parts)


def _axes(
    x: Scale,
    y: Scale,
    extent: tuple[float, float],
    margins: tuple[float, float, float, float],
    *,
    show_x: Callable[[float], str],
    show_y: Callable[[float], str],
    at_x: Sequence[float] = (),
) -> list[Markup]:
    """Lines and ticks; those of x stand at round values, or where `at_x` says."""
    (width, height), (left, right, top, bottom) = extent, margins
    about = 6 if width > 500 else 3
    parts = [line(left, height - bottom, width - right, height - bottom, "base")]
    for tick in at_x or x.ticks(about):
        parts += [line(x(tick), top, x(tick), height - bottom), text(x(tick), height - bottom + 16, show_x(tick), anchor="middle", css="tick")]
    for tick in y.ticks(5):
        parts += [line(left, y(tick), width - right, y(tick)), text(left - 6, y(tick) + 4, show_y(tick), anchor="end", css="tick")]
    return parts


class Bar(NamedTuple):
    """A horizontal bar from `start` to `end`, with its value written behind it."""

    label: str
    start: float
    end: float
    text: str
    css: str
    tip: str


def _label_width(labels: Iterable[str], width: float) -> float:
    return min(max((len(t) for t in labels), default=0) * CHARACTER + 10, width * 0.53)


def bars(items: Sequence[Bar], width: float, label: str, *, zero: bool = True) -> Markup:
    """Horizontal bars, or a waterfall where bars start at their predecessor's end. `zero`: the axis starts at 0."""
    pitch, top = 26.0, 4.0
    left = _label_width((b.label for b in items), width)
    room = max((len(b.text) for b in items), default=0) * CHARACTER + 12
    scale = Scale([v for b in items for v in (b.start, b.end) if zero or v], left, width - room, margin=0.0 if zero else 0.15, zero=zero)
    parts = [line(left, 0, left, top + pitch * len(items), "base")]
    for index, b in enumerate(items):
        y = top + index * pitch
        # bars of a cut axis start at its edge, those of a waterfall at their predecessor's end
        low, high = sorted((scale(b.start) if zero or b.start else left, scale(b.end)))
        low = max(low, left)
        parts += [text(left - 6, y + 15, clipped(b.label, left), anchor="end", css="tick"), rectangle(low, y + 3, high - low, pitch - 8, css=b.css, tip=b.tip)]
        parts.append(text(high + 6, y + 15, b.text, css="label"))
        if index + 1 < len(items) and items[index + 1].start == b.end:
            parts.append(line(scale(b.end), y + pitch - 5, scale(b.end), y + pitch + 3, "link"))
    return svg(width, top + pitch * len(items) + 4, label, parts)


def clipped(label: str, width: float) -> str:
    """A label cut to what `width` px hold."""
    keep = max(3, int((width - 8) / CHARACTER))
    return label if len(label) <= keep else label[: keep - 1] + "…"


class Distribution(NamedTuple):
    """21 quantiles (0 %, 5 %, …, 100 %) of one row."""

    label: str
    quantiles: Sequence[float]
    colour: int
    tip: str


def distributions(items: Sequence[Distribution], width: float, x_title: str, label: str) -> Markup:
    """A box (25–75 %), a bar (5–95 %), a hairline (0–100 %) and the median for each row; logarithmic over a factor of ten."""
    pitch, top, bottom, right = 24.0, 6.0, 40.0, 14.0
    left = _label_width((d.label for d in items), width)
    height = top + pitch * len(items) + bottom
    scale = Scale([q for d in items for q in (d.quantiles[0], d.quantiles[-1])], left + 4, width - right, margin=0.02, log_from=10)
    parts = []
    for tick in scale.ticks(6 if width > 500 else 3):
        parts += [
            line(scale(tick), top, scale(tick), height - bottom),
            text(scale(tick), height - bottom + 15, tick_label(tick), anchor="middle", css="tick"),
        ]
    for index, d in enumerate(items):
        y = top + index * pitch + pitch / 2
        q, fill = [scale(v) for v in d.quantiles], f"f{d.colour % COLOURS}"
        parts += [text(left - 6, y + 4, clipped(d.label, left), anchor="end", css="tick"), line(q[0], y, q[20], y, "whisker")]
        parts += [rectangle(q[1], y - 3, q[19] - q[1], 6, css=f"{fill} faint"), rectangle(q[5], y - 7, q[15] - q[5], 14, css=f"{fill} soft")]
        parts += [line(q[10], y - 9, q[10], y + 9, "median"), rectangle(left, y - pitch / 2, width - right - left, pitch, css="hit", tip=d.tip)]
    parts.append(text(width - right, height - 4, x_title + (" (logarithmic)" if scale.log else ""), anchor="end", css="axis"))
    return svg(width, height, label, parts)


class Series(NamedTuple):
    """A curve. `points`: (x, value, tip), of training curves the epoch since the run's start; None breaks the line between stages."""

    name: str
    colour: int
    dashed: bool
    points: Sequence[tuple[float, float, str] | None]


def curves(
    series: Sequence[Series],
    bounds: Sequence[tuple[float, str]],
    width: float,
    *,
    y_title: str,
    show_y: Callable[[float], str],
    label: str,
    x_title: str = "epoch, all stages",
    x_log_from: float | None = None,
) -> Markup:
    """Curves over epochs, stages side by side, or over other whole numbers.

    Args:
        bounds: the first epoch of each stage and its name.
        x_log_from: x is logarithmic if it spans more than this factor, with ticks at the values measured if they are few; None keeps it linear.
    """
    height = 270.0
    left, right, top, bottom = 58.0, 12.0, 40.0, 40.0
    points = [p for s in series for p in s.points if p is not None]
    x = Scale([p[0] for p in points], left, width - right, margin=0.03, log_from=x_log_from)
    y = Scale([p[1] for p in points], height - bottom, top, margin=0.08, log_from=30)
    measured = sorted({p[0] for p in points}) if x_log_from is not None else []
    at_x = measured if len(measured) <= FEW else []
    parts = _axes(x, y, (width, height), (left, right, top, bottom), show_x=lambda v: f"{v:g}" if v == int(v) else "", show_y=show_y, at_x=at_x)
    starts = [*(first for first, _ in bounds), math.inf]
    for index, (first, name) in enumerate(bounds):
        edge = left if index == 0 else x(first - 0.5)
        end = min(x(starts[index + 1] - 0.5), width - right) if starts[index + 1] < math.inf else width - right
        if index:
            parts.append(line(edge, top - 12, edge, height - bottom, "stage"))
        parts.append(text(edge + 4, top - 4, clipped(name, end - edge), css="label"))
    for s in series:
        for run in _runs(s.points):
            parts.append(path([(x(px), y(py)) for px, py, _ in run], f"curve s{s.colour % COLOURS}" + (" dashed" if s.dashed else "")))
            parts += [marker(x(px), y(py), 0, f"mark f{s.colour % COLOURS}", tip=tip, radius=3.2) for px, py, tip in run]
    parts += [
        text(4, 13, y_title + (" (logarithmic)" if y.log else ""), css="axis"),
        text(width - right, height - 6, x_title + (" (logarithmic)" if x.log else ""), anchor="end", css="axis"),
    ]
    return svg(width, height, label, parts)


def _runs(points: Sequence[tuple[float, float, str] | None]) -> list[list[tuple[float, float, str]]]:
    """The stretches between the breaks."""
    runs: list[list[tuple[float, float, str]]] = [[]]
    for p in points:
        if p is None:
            runs.append([])
        else:
            runs[-1].append(p)
    return [run for run in runs if run]


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str], width: float, label: str) -> Markup:
    """A heat map, truth by row. Opacity is the share of the row; errors and hits differ in colour."""
    n = len(classes)
    left = min(_label_width(classes, width) + 14, width * 0.3)
    cell = min((width - left - 6) / n, 44.0)
    longest = max(len(c) for c in classes) * CHARACTER
    upright = longest <= cell
    top = 42.0 if upright else 26.0 + min(longest, 14 * CHARACTER)
    parts = [text(4, 13, "rows: truth, columns: predicted", css="axis")]
    for j, name in enumerate(classes):
        cx = left + (j + 0.5) * cell
        if upright:
            parts.append(text(cx, top - 6, name, anchor="middle", css="tick"))
        else:
            parts.append(
                Markup('<text transform="translate({} {}) rotate(-90)" class="tick">{}</text>').format(f"{cx + 4:.1f}", f"{top - 4:.1f}", clipped(name, 100))
            )
    for i, row in enumerate(matrix):
        total = sum(row) or 1
        parts.append(text(left - 6, top + (i + 0.5) * cell + 4, clipped(classes[i], left), anchor="end", css="tick"))
        for j, number in enumerate(row):
            tip = (
                f"{classes[i]} taken for {classes[j]}: {number} of {sum(row)}"
                if number and i != j
                else f"{classes[i]}: {number} of {sum(row)} right"
                if i == j
                else ""
            )
            share = 0.0 if not number else max(0.12, number / total)
            place = (f"{left + j * cell + 0.5:.1f}", f"{top + i * cell + 0.5:.1f}", f"{cell - 1:.1f}", f"{cell - 1:.1f}")
            parts.append(Markup('<rect x="{}" y="{}" width="{}" height="{}" class="empty"/>').format(*place))
            if number:
                style = Markup(' style="fill-opacity:{}"').format(f"{share:.2f}")
                parts.append(
                    Markup('<rect x="{}" y="{}" width="{}" height="{}" class="{}"{}{}/>').format(
                        *place, "hit-right" if i == j else "hit-wrong", style, _tip(tip)
                    )
                )
            if number and len(str(number)) * CHARACTER < cell - 2:
                css = "cell" + (" on" if share > 0.55 else "")
                parts.append(text(left + (j + 0.5) * cell, top + (i + 0.5) * cell + 4, str(number), anchor="middle", css=css))
    return svg(max(left + n * cell + 6, 200.0), top + n * cell + 6, label, parts)


def swatch(colour: int) -> Markup:
    """A legend symbol: a filled square."""
    return rectangle(2, 2, 12, 12, css=f"f{colour % COLOURS}")


def stroke(colour: int, dashed: bool) -> Markup:
    """A legend symbol: a stretch of curve."""
    return line(0, 8, 16, 8, f"curve s{colour % COLOURS}" + (" dashed" if dashed else ""))
