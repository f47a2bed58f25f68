"""What reports tell of a variant's record beside its figures, in the form that our stages write it.

A record is free-form: an older release wrote other keys, and a third party's stage may call anything of its own "pruning". So each part is told where
it has the form below, and is left out where it has not; `report.json` holds it either way.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, NotRequired, get_type_hints

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # typing's has no types that pydantic can read on Python 3.11

Facts = Mapping[str, Any]


class Reached(TypedDict):
    """Shares of the parent's."""

    macs: float
    params: float


class RatioTarget(TypedDict):
    """A share of MACs or parameters to keep, whichever is given."""

    macs: NotRequired[float]
    params: NotRequired[float]


class LatencyGoal(TypedDict):
    """`ratio` to the parent's latency, or `ms`."""

    backend: str
    batch: int
    ratio: NotRequired[float]
    ms: NotRequired[float]


class LatencyTarget(TypedDict):
    latency: LatencyGoal


class Alignment(TypedDict):
    """Channels are multiples of `round_to`; the rest where that was found by timing."""

    round_to: int | str


class TimedAlignment(Alignment):
    backend: str
    batch: int
    p50_ms: dict[str, float]
    fastest: NotRequired[int]


class SmallChannels(TypedDict):
    before: float
    after: float


class Sparse(TypedDict):
    small_channels: SmallChannels


class Reading(TypedDict):
    ratio: float
    ratio_ci95: tuple[float, float] | None
    ms: float
    parent_ms: float
    blocks: int
    invalid: str | None


class Tried(Reading):
    macs_ratio: float
    confirming: bool


class Search(TypedDict):
    iteration: int
    goal: float
    trace: list[Tried]


class Comparison(Reading):
    backend: str
    batch: int


class NoComparison(TypedDict):
    backend: str
    batch: int
    reason: str


class Group(TypedDict):
    name: str
    channels: int
    scores: list[float]


class GroupSensitivity(TypedDict):
    metric: str
    n: int
    whole: float
    ratios: list[float]
    groups: list[Group]


class UncutGroup(TypedDict):
    name: str
    channels: int
    why: str


class Whole(TypedDict):
    """Of so many groups of channels those that lost none."""

    groups: int
    left: list[UncutGroup]


class Pruning(TypedDict, total=False):
    """The record's "pruning"."""

    target: LatencyTarget | RatioTarget
    reached: Reached
    alignment: TimedAlignment | Alignment
    sparse: Sparse
    latency: list[Search]
    against_parent: Comparison | NoComparison
    sensitivity: GroupSensitivity
    whole: Whole
    parametrizations_removed: list[str]


class Score(TypedDict):
    distance: float
    primary: float


class Layer(TypedDict):
    layer: str
    alone: Score
    spared: Score


class LayerSensitivity(TypedDict):
    images: int
    distance: str
    int8: Score
    float: Score
    layers: list[Layer]


class Choice(TypedDict):
    layer: str | None
    kept: bool
    primary: float


class MixedPrecision(TypedDict):
    backend: str
    max_accuracy_drop_pp: float
    parent: float
    latency_cost: dict[str, float]
    trace: list[Choice]


class Quantization(TypedDict, total=False):
    """The record's "quantization"."""

    float_layers: list[str]
    sensitivity: LayerSensitivity
    mixed_precision: MixedPrecision


_FORMS: Mapping[str, type[Any]] = {"pruning": Pruning, "quantization": Quantization}


def told(variant: Mapping[str, Any], part: Literal["pruning", "quantization"]) -> dict[str, Any]:
    """Of this part of a variant's record what has its form and is not empty, with nothing else in it; {} where there is nothing such."""
    record = variant.get("record")
    given = record.get(part) if isinstance(record, Mapping) else None
    found = {}
    for name, form in _forms(part).items():
        try:
            found[name] = form.validate_python(given.get(name) if isinstance(given, Mapping) else None)
        except ValidationError:
            continue
    return {name: value for name, value in found.items() if value}


@cache
def _forms(part: str) -> dict[str, TypeAdapter[Any]]:
    return {name: TypeAdapter(hint) for name, hint in get_type_hints(_FORMS[part]).items()}
