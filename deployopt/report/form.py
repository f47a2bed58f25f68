"""What renderers, gates and `compare` read of a stored report, as types: a report that is JSON of another form is refused when it is read.

Keys that are not here are free. A figure may be missing or None, as the renderers allow; where it is given, it has its type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, NotRequired, Required

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # typing's has no types that pydantic can read on Python 3.11

from deployopt.report import summary

Interval = Annotated[list[float | None], Field(min_length=2, max_length=2)]
PositiveInterval = Annotated[list[Annotated[PositiveFloat, Field(allow_inf_nan=False)]], Field(min_length=2, max_length=2)]
SHOWN = 60  # characters of a value that is named


class Clock(TypedDict, total=False):
    p50: Required[PositiveFloat | None]
    p50_ci95: PositiveInterval | None
    p90: float | None
    p99: float | None
    quantiles: list[float] | None


class Latency(TypedDict, total=False):
    host: Clock | None
    device: Clock | None


class File(TypedDict, total=False):
    path: str | None
    bytes: int | None


class Verified(TypedDict):
    quantized_layers: int
    quantizable_layers: int
    executed: dict[str, int]
    kept_in_float: NotRequired[int | None]


class Fusion(TypedDict):
    adds: int
    fused_adds: int
    int8_to_float: int
    reformats: int
    layers: NotRequired[dict[str, int]]


class ProfiledLayer(TypedDict):
    name: str
    kind: str
    nodes: list[str]
    precision: str
    time_us: float


class Profile(TypedDict):
    how: str
    runs: int
    total_us: float
    precision_us: dict[str, float]
    layers: list[ProfiledLayer]


class WarmUp(TypedDict, total=False):
    seconds: float | None
    runs: int | None


class Inputs(TypedDict, total=False):
    buffers: int | None


class Load(TypedDict, total=False):
    other_cpu_percent: float | None
    steal_percent: float | None
    gpu_power_w: float | None


class Contract(TypedDict, total=False):
    warm_up: WarmUp | None
    inputs: Inputs | None
    load: Load | None
    load_ms: float | None
    first_inference_ms: float | None
    duration_s: float | None
    blocks: int | None
    iterations: int | None
    threads: int | None
    streams: int | None
    interleaved_with: list[str] | None
    flags: list[Any] | None


class Noise(TypedDict, total=False):
    p50_ms: list[PositiveFloat] | None
    peak_memory_bytes: list[PositiveFloat] | None
    same_rounds: list[PositiveFloat] | None


class Row(TypedDict, total=False):
    variant: Required[str]
    backend: Required[str]
    precision: Required[str]
    batch: Required[PositiveInt]
    status: Required[str]
    sweep: str | None
    scenario: str | None
    samples: str | None
    reason: str | None
    notes: list[str] | None
    options: dict[str, Any] | None
    threads: PositiveInt | None
    accuracy: dict[str, Any] | None
    artifact: File | None
    verified: Verified | None
    fusion: Fusion | None
    profile: Profile | None
    latency_ms: Latency | None
    contract: Contract | None
    noise: Noise | None
    throughput_per_s: float | None
    throughput_ci95: Interval | None
    speedup: float | None
    speedup_ci95: Interval | None
    speedup_best_float: float | None
    peak_memory_bytes: float | None
    device_memory_bytes: float | None


class Epoch(TypedDict, total=False):
    train_loss: float | None
    validation_loss: float | None
    lr: float | None


class Details(TypedDict, total=False):
    confusion: list[list[int]] | None
    classes: list[Any] | None


class Variant(TypedDict, total=False):
    name: Required[str]
    parent: str | None
    stage: str | None
    family: str
    params: float | None
    macs: float | None
    size_bytes: float | None
    seconds: float | None
    accuracy: dict[str, Any] | None
    curves: list[Epoch] | None
    details: Details | None


class Task(TypedDict):
    primary: str
    unit: str
    higher_is_better: bool


class Processor(TypedDict, total=False):
    cores: int | None
    isa: list[str] | None


class Environment(TypedDict, total=False):
    cpu: Processor | None
    gpus: list[Any] | None
    versions: dict[str, Any] | None


class Violation(TypedDict):
    limit: str
    row: str | None
    sentence: str


class Budget(TypedDict, total=False):
    met: bool
    limits: dict[str, float | None] | None
    violations: list[Violation] | None


class Recommended(TypedDict):
    row: NonNegativeInt
    why: str
    within_budget: NotRequired[bool]


class Step(TypedDict, total=False):
    seconds: float | None


class Model(TypedDict, total=False):
    arch: str | None


class Recipe(TypedDict, total=False):
    model: Model | None


class Stored(TypedDict, total=False):
    """The whole of report.json."""

    variants: Required[list[Variant]]
    rows: Required[list[Row]]
    task: Task | None
    environment: Environment | None
    recipe: Recipe | None
    dataset: dict[str, Any] | None
    classes: list[Any] | None
    steps: list[Step] | None
    budget: Budget | None
    recommended: Recommended | None


@cache
def _stored() -> TypeAdapter[Stored]:
    return TypeAdapter(Stored)


def fault(report: Mapping[str, Any]) -> str | None:
    """The first thing that is not as it is read, such as "rows[3].latency_ms: wanted a dictionary, found 5"; None if all is."""
    return mismatch(_stored(), report) or _wrong_score(report) or _wrong_recommendation(report)


def mismatch(form: TypeAdapter[Any], found: object) -> str | None:
    """The first thing in which a JSON value has not this form; None if it has it."""
    try:
        form.validate_python(found, strict=True)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False)[0]
        where = first["loc"]
        if first["type"] == "missing":
            return f"{_address(where[:-1]) or 'it'} has no {where[-1]!r}"
        return f"{_address(where) or 'it'}: {first['msg'].replace('Input should be', 'wanted')}, found {_short(first['input'])}"
    return None


def _wrong_score(report: Mapping[str, Any]) -> str | None:
    """Scores are under the name of the task's metric, which no type can say."""
    task = summary.task_of(report)
    name = task["primary"]
    scores = [(f"{part}[{i}].accuracy.{name}", summary.primary_score(entry, task)) for part in ("variants", "rows") for i, entry in enumerate(report[part])]
    for index, variant in enumerate(report["variants"]):
        curves = enumerate(variant.get("curves") or [])
        scores += [(f"variants[{index}].curves[{i}].validation_{name}", epoch.get(f"validation_{name}")) for i, epoch in curves]
    wrong = ((where, value) for where, value in scores if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)))
    return next((f"{where}: wanted a number, found {_short(value)}" for where, value in wrong), None)


def _wrong_recommendation(report: Mapping[str, Any]) -> str | None:
    recommended, rows = report.get("recommended"), len(report["rows"])
    if recommended is None or recommended["row"] < rows:
        return None
    return f"recommended.row: wanted one of its {rows} rows, counted from 0, found {recommended['row']}"


def _address(location: Sequence[int | str]) -> str:
    """As "rows[3].latency_ms"."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
