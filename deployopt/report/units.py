"""Figures as people read them. Every function takes None for "not known" and gives "–"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

UNKNOWN = "–"
MINUS = "−"  # U+2212: as wide as "+", unlike the hyphen


def significant(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, never in exponent form: 0.0412, 4.12, 41.2, 412, 4120."""
    if value is None:
        return UNKNOWN
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}".replace("-", MINUS)


def milliseconds(value: float | None) -> str:
    return UNKNOWN if value is None else f"{significant(value)} ms"


def count(value: float | None) -> str:
    """A count with an SI suffix: 141 M, 11.2 M, 980."""
    if value is None:
        return UNKNOWN
    for scale, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale:
            return significant(value / scale) + suffix
    return f"{value:.0f}"


def size(size_bytes: float | None) -> str:
    """Bytes in decimal units, as file managers and registries count: 2.91 MB."""
    if size_bytes is None:
        return UNKNOWN
    text = count(size_bytes)
    return f"{text}B" if " " in text else f"{text} B"


def seconds(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def time_left(value: float) -> str:
    """An estimate, so without tenths."""
    return f"about {value:.0f} s left" if value < 60 else f"about {seconds(value)} left"


def factor(value: float | None) -> str:
    return UNKNOWN if value is None else f"{significant(value)}x"


def interval(bounds: list[float] | None, decimals: int | None = None) -> str:
    """A 95 % interval; without `decimals` they follow its lower end, so that both ends read alike."""
    if not bounds or None in bounds:
        return ""
    low, high = bounds
    if decimals is None:
        decimals = max(0, 2 - math.floor(math.log10(abs(low)))) if low else 3
    return f"{low:.{decimals}f}–{high:.{decimals}f}"


def metric_name(name: str) -> str:
    """A metric's name in prose: top1 → top-1."""
    return {"top1": "top-1", "top5": "top-5", "mae": "MAE", "rmse": "RMSE"}.get(name, name.replace("_", " "))


def is_fraction(task: Mapping[str, Any]) -> bool:
    return not task["unit"]


def score(value: float | None, task: Mapping[str, Any]) -> str:
    """The primary metric: a fraction as percent, anything else in the task's unit."""
    if value is None:
        return UNKNOWN
    return f"{100 * value:.2f} %" if is_fraction(task) else f"{significant(value, 4)} {task['unit']}"


def signed(value: float | None, decimals: int = 2) -> str:
    """+0.14, −0.28, and 0.00 without a sign."""
    if value is None:
        return UNKNOWN
    rounded = round(value, decimals)
    return f"{abs(rounded):.{decimals}f}" if rounded == 0 else f"{'+' if rounded > 0 else MINUS}{abs(rounded):.{decimals}f}"


def change(value: float | None, task: Mapping[str, Any]) -> str:
    """A difference of the primary metric (percentage points for a fraction) with its unit."""
    if value is None:
        return UNKNOWN
    return f"{signed(value)} pp" if is_fraction(task) else f"{signed(value, 3)} {task['unit']}"


def listed(items: Sequence[str], most: int) -> str:
    """At most so many of them, and how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
