"""Compare two runs row by row: what became faster or slower beyond noise, what cannot be compared and why, and whether a gate holds.

Two stored reports come from different process lifetimes, mostly from different hours. Blocks inside a run cannot see that noise: where the benchmark
stage repeated its artifacts (`benchmark.aa_repeats`), an interval reaches at least as far as the same artifact differed from itself between lifetimes;
elsewhere the comparison says that this noise is not known. `bench.rerun` measures both sides interleaved instead.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from deployopt import backends, plugins
from deployopt.bench.environment import environment, utc_now
from deployopt.bench.targets import distributions
from deployopt.errors import ArtifactError, UsageError
from deployopt.report import summary, units
from deployopt.report.summary import JsonRow, Report
from deployopt.runtime.statistics import MINIMUM_BLOCKS, Ratio, bootstrap_ratio, floor_between_lifetimes, floor_of_ratios, widened

if TYPE_CHECKING:
    from deployopt.bench.rerun import Plan

Verdict = Literal["faster", "slower", "same within noise", "not comparable", "added", "removed"]
Regression = Literal["latency", "throughput", "memory", "size", "accuracy", "missing"]
COMPARED: tuple[Verdict, ...] = ("faster", "slower", "same within noise")
Bounds = tuple[float, float]
TOLD_BY_SOME = ("waiting threads", "kernels for a shape")  # conditions that older reports and some runtimes do not hold
SYNTHETIC_IMAGES = "synthetic 1/f noise of each model's input size, not with the runs' images"


@dataclass(frozen=True)
class Gates:
    """What may become worse by how much; None is no gate.

    Attributes:
        max_latency_regression, max_throughput_regression, max_memory_regression, max_size_regression: shares, 0.05 for 5 %. The first three are
            missed only where the whole 95 % interval lies beyond; memory on a GPU and sizes are exact. The latency of an offline row is that under load
            and is not gated.
        max_accuracy_drop: percentage points, or the metric's unit if it is no fraction.
        allow_missing: a row that the base measured and the new run did not is then no miss of whatever gate was asked for.
    """

    max_latency_regression: float | None = None
    max_throughput_regression: float | None = None
    max_memory_regression: float | None = None
    max_size_regression: float | None = None
    max_accuracy_drop: float | None = None
    allow_missing: bool = False

    @property
    def asked(self) -> bool:
        return any(value is not None for name, value in asdict(self).items() if name != "allow_missing")


class Reran(NamedTuple):
    """A row of both runs measured again, interleaved, over several process lifetimes. Ratios are new / base. `noise`: what disturbed it, if anything;
    `device`: of latencies by the device clock, `device_memory`: of GPU memory, where both have one. `threads`, `ran_on`: of both sides, "cpu" or "cuda:N"."""

    base_p50_ms: float
    new_p50_ms: float
    latency: Ratio
    throughput: Ratio
    memory: Ratio | None
    lifetimes: int
    noise: str = ""
    device: Ratio | None = None
    device_memory: float | None = None
    threads: int | None = None
    ran_on: str | None = None


@dataclass(frozen=True)
class RowComparison:
    """One row of both runs.

    Attributes:
        key: variant/backend/precision/bN.
        judged_by: what the verdict goes by: "throughput" in the offline scenario, else "latency".
        why: what differs, for "not comparable", or what is odd about the verdict.
        ratio: new median / base median of the host clock; above 1 is slower. ratio_ci95: its 95 % interval.
        base_p50_ms, new_p50_ms: host clock.
        interval_from: "block medians", "block medians and A/A repeats", "process lifetimes" (measured again), or "p50_ci95" where block medians are
            missing (then wider than needed).
        noise_floor: share by which the same artifact differs from itself between process lifetimes, from the stored A/A repeats; None if there are none.
        noise_floor_same_rounds: the same of two processes in the same interleaved rounds.
        device_ratio: as `ratio`, of the device clock, which leaves copies out; None where the runtime has none. Not judged.
        throughput_ratio, memory_ratio, size_ratio: new / base of images a second, of the process's peak memory and of the artifact's bytes.
        device_memory_ratio: new / base of the process's memory on its GPU; None where either ran on none. The memory gate holds it too.
        accuracy_change_pp: new − base, percentage points for a fraction, else in the metric's unit.
        regressions: the gates this row misses.
        undecided: the gates it meets only because its interval is wide: that reaches beyond them, without lying beyond as a whole.
        lifetimes, threads, device: of a row that was measured again: process lifetimes of both sides, CPU threads, and "cpu" or "cuda:N".
    """

    key: str
    verdict: Verdict
    judged_by: Literal["latency", "throughput"] = "latency"
    why: str = ""
    ratio: float | None = None
    ratio_ci95: Bounds | None = None
    base_p50_ms: float | None = None
    new_p50_ms: float | None = None
    interval_from: str | None = None
    noise_floor: float | None = None
    noise_floor_same_rounds: float | None = None
    device_ratio: float | None = None
    device_ratio_ci95: Bounds | None = None
    throughput_ratio: float | None = None
    throughput_ratio_ci95: Bounds | None = None
    memory_ratio: float | None = None
    memory_ratio_ci95: Bounds | None = None
    device_memory_ratio: float | None = None
    size_ratio: float | None = None
    accuracy_change_pp: float | None = None
    regressions: tuple[Regression, ...] = ()
    undecided: tuple[Regression, ...] = ()
    lifetimes: int | None = None
    threads: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Comparison:
    """The whole of `deployopt compare`, JSON-able by `to_json`.

    Attributes:
        base, new: names of the runs.
        task: of the new run.
        reran: measured here and now, rather than read from two reports.
        rerun: how, as `bench.rerun.Plan` has it, with the images; None if it was not, or that is not told.
        time, environment: when (UTC) and where the new figures were measured.
        recipe_changes: "key: base → new" of what differs between the two recipes.
        notes: what a reader should know of all rows: noise that is not known.
        misses: one sentence a missed gate; the gates are met if there is none.
    """

    base: str
    new: str
    task: Mapping[str, Any]
    rows: Sequence[RowComparison]
    gates: Gates
    time: str
    environment: Mapping[str, Any]
    reran: bool = False
    rerun: Mapping[str, Any] | None = None
    recipe_changes: Sequence[str] = ()
    notes: Sequence[str] = ()
    misses: Sequence[str] = field(default_factory=tuple)

    @property
    def met(self) -> bool:
        return not self.misses

    def counts(self) -> dict[str, int]:
        """ "rows": those that any gate is about; "not_compared": those of them of which not all that the gates hold is known."""
        held = [(row, known) for row in self.rows if row.verdict != "added" and (known := _held(row, self.gates))]
        return {"rows": len(held), "not_compared": sum(row.verdict not in COMPARED and None in known.values() for row, known in held)}

    def to_json(self) -> dict[str, Any]:
        rows = [{key: list(value) if isinstance(value, tuple) else value for key, value in asdict(r).items()} for r in self.rows]
        return {
            "schema": 1,
            "base": self.base,
            "new": self.new,
            "task": dict(self.task),
            "time": self.time,
            "environment": dict(self.environment),
            "reran": self.reran,
            "rerun": None if self.rerun is None else dict(self.rerun),
            "recipe_changes": list(self.recipe_changes),
            "notes": list(self.notes),
            "rows": rows,
            "gate": {**asdict(self.gates), "asked": self.gates.asked, **self.counts(), "met": self.met, "misses": list(self.misses)},
        }


class _Run(NamedTuple):
    report: Report
    folder: Path


def _versions(backend: str, where: Mapping[str, Any]) -> dict[str, str]:
    """Versions of the distributions a backend runs on: onnxruntime and onnxruntime-gpu, tensorrt-cu12 but not tensorrt-rtx."""
    found = {}
    for name, version in (where.get("versions") or {}).items():
        plain = str(name).replace("-", "_").lower()
        rest = plain.removeprefix(backend)
        if plain.startswith(backend) and (not rest or (rest[0] == "_" and not rest.startswith("_rtx"))):
            found[str(name)] = str(version)
    return found


def _conditions(row: JsonRow, where: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that must agree before two latencies may be compared."""
    contract = row.get("contract") or {}
    inputs = contract.get("inputs") or {}
    cpu = where.get("cpu") or {}
    on_cpu = str(row.get("provider")).startswith("CPU")  # "CPU", "CPUExecutionProvider"
    conditions: dict[str, Any] = {
        "CPU model": cpu.get("model"),
        "usable cores": cpu.get("cores"),
        "ISA": ", ".join(sorted(cpu.get("isa") or [])),
        "provider": row.get("provider"),
        "device": contract.get("device") or ("cpu" if on_cpu else None),  # older reports do not hold it
        "target": row.get("target"),
        "scenario": row.get("scenario"),
        "options": row.get("options") or {},
        "threads": row.get("threads"),
        "streams": contract.get("streams") or 1,
        "CUDA graph": contract.get("cuda_graph"),
        "waiting threads": contract.get("waiting_threads"),
        "kernels for a shape": contract.get("shape_specialization"),
        "clock": contract.get("clock"),
        "copies": contract.get("copies"),
        "input shape": inputs.get("shape") or inputs.get("shapes"),
        "runtime version": _versions(backends.runtime_of(row["backend"]), where),
    }
    if not on_cpu:
        gpus = [g if isinstance(g, Mapping) else {"name": g} for g in where.get("gpus") or []]
        conditions["GPU model"] = [g.get("name") for g in gpus]
        conditions["driver"] = [g.get("driver") for g in gpus]
    return conditions


def _differences(base: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The conditions that differ, as prose; "" if none. Of those that not every report tells, only what both sides tell can."""

    def show(value: Any) -> str:
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
        return text or "none"

    names = [n for n in dict.fromkeys([*base, *new]) if base.get(n) != new.get(n)]
    known = [n for n in names if n not in TOLD_BY_SOME or None not in (base.get(n), new.get(n))]
    return "; ".join(f"{n}: {show(base.get(n))} → {show(new.get(n))}" for n in known)


class _Samples(NamedTuple):
    """Raw values of a row, one a block: median in ms by the host's clock, images a second, median by the device's (None in files that do not hold them)."""

    medians_ms: list[float]
    throughputs_per_s: list[float] | None
    device_medians_ms: list[float] | None


def _samples(row: JsonRow, folder: Path) -> _Samples | None:
    """None if the row has no file of them.

    Raises:
        ArtifactError: a samples file that lies outside the run folder, is not as the benchmark stage writes it or belongs to another row.
    """
    name = row.get("samples")
    if not name:
        return None
    file = (folder / name).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise ArtifactError(f"{summary.row_key(row)}: its samples {name!r} lie outside the run folder {folder}", "compare run folders that deployopt wrote")
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        owner = content["row"]
        medians = [float(v) for v in content["host_block_medians"]]
        throughputs = [float(v) for v in content["block_throughputs_per_s"]] if "block_throughputs_per_s" in content else None
        device = [float(v) for v in content["device_block_medians"]] if content.get("device_block_medians") else None
    except (ValueError, KeyError, TypeError) as exc:
        raise ArtifactError(f"{file}: wanted {{'row', 'unit', 'host_block_medians'}}, found something else ({exc!r})", "run the benchmark again") from exc
    if owner != summary.row_key(row):
        raise ArtifactError(f"{file}: wanted samples of {summary.row_key(row)}, found those of {owner}", "run the benchmark again")
    if any(not values or not all(math.isfinite(v) and v > 0 for v in values) for values in (medians, throughputs, device) if values is not None):
        raise ArtifactError(f"{file}: wanted blocks above zero, at least one", "run the benchmark again")
    return _Samples(medians, throughputs, device)


def _noise(rows: Sequence[JsonRow], key: str, floor: Callable[[Sequence[float]], float]) -> float | None:
    """The larger of the rows' noise floors, by their stored A/A repeats; None if no row has any."""
    stored = [(row.get("noise") or {}).get(key) or [] for row in rows]
    return max((floor(values) for values in stored if values), default=None)


def _reached(ratio: Ratio, floor: float | None) -> Ratio:
    return ratio if floor is None else widened(ratio, floor)


def _stored_latency(base: JsonRow, new: JsonRow, before: _Samples | None, after: _Samples | None) -> dict[str, Any]:
    """Fields of the row's latency: ratio new/base, its interval, where that comes from and a remark."""
    floor = _noise((base, new), "p50_ms", floor_between_lifetimes)
    if before and after:
        found = _reached(bootstrap_ratio(after.medians_ms, before.medians_ms, paired=False), floor)
        few = min(len(before.medians_ms), len(after.medians_ms))
        remark = f"only {few} blocks: the interval under-covers, {MINIMUM_BLOCKS} are needed" if few < MINIMUM_BLOCKS else ""
        source = "block medians" if floor is None else "block medians and A/A repeats"
        return {"ratio": found.value, "ratio_ci95": (found.low, found.high), "interval_from": source, "noise_floor": floor, "why": remark}
    ratio = float(summary.host(new)["p50"] / summary.host(base)["p50"])
    low_base, high_base = summary.host(base).get("p50_ci95") or (None, None)
    low_new, high_new = summary.host(new).get("p50_ci95") or (None, None)
    if not low_base or not high_base or not low_new or not high_new:
        return {"ratio": ratio, "why": "no block medians and no interval of the median: noise is not known"}
    # the quotient of the ends covers at least 95 %: both medians would have to err in opposite directions
    found = _reached(Ratio(ratio, low_new / high_base, high_new / low_base), floor)
    remark = "block medians are missing; the interval is from each run's own and is wider"
    return {"ratio": ratio, "ratio_ci95": (found.low, found.high), "interval_from": "p50_ci95", "noise_floor": floor, "why": remark}


def _stored_figures(base: JsonRow, new: JsonRow, runs: tuple[_Run, _Run]) -> dict[str, Any]:
    """Latency, throughput and memory of one row of both stored reports."""
    before, after = _samples(base, runs[0].folder), _samples(new, runs[1].folder)
    facts = _stored_latency(base, new, before, after)
    facts["noise_floor_same_rounds"] = _noise((base, new), "same_rounds", floor_of_ratios)
    if before and after and before.throughputs_per_s and after.throughputs_per_s:
        throughput = _reached(bootstrap_ratio(after.throughputs_per_s, before.throughputs_per_s, paired=False), facts.get("noise_floor"))
        facts |= {"throughput_ratio": throughput.value, "throughput_ratio_ci95": (throughput.low, throughput.high)}
    if before and after and before.device_medians_ms and after.device_medians_ms:
        device = _reached(bootstrap_ratio(after.device_medians_ms, before.device_medians_ms, paired=False), facts.get("noise_floor"))
        facts |= {"device_ratio": device.value, "device_ratio_ci95": (device.low, device.high)}
    if base.get("peak_memory_bytes") and new.get("peak_memory_bytes"):
        plain = new["peak_memory_bytes"] / base["peak_memory_bytes"]
        memory = _reached(Ratio(plain, plain, plain), _noise((base, new), "peak_memory_bytes", floor_between_lifetimes))
        facts |= {"memory_ratio": plain, "memory_ratio_ci95": (memory.low, memory.high)}
    if base.get("device_memory_bytes") and new.get("device_memory_bytes"):
        facts["device_memory_ratio"] = new["device_memory_bytes"] / base["device_memory_bytes"]
    return facts


def _reran_figures(found: Reran) -> dict[str, Any]:
    latency, throughput, memory = found.latency, found.throughput, found.memory
    facts: dict[str, Any] = {
        "base_p50_ms": found.base_p50_ms,
        "new_p50_ms": found.new_p50_ms,
        "ratio": latency.value,
        "ratio_ci95": (latency.low, latency.high),
        "interval_from": "process lifetimes",
        "why": found.noise,
        "throughput_ratio": throughput.value,
        "throughput_ratio_ci95": (throughput.low, throughput.high),
        "lifetimes": found.lifetimes,
        "threads": found.threads,
        "device": found.ran_on,
    }
    facts["device_memory_ratio"] = found.device_memory
    if found.device is not None:
        facts |= {"device_ratio": found.device.value, "device_ratio_ci95": (found.device.low, found.device.high)}
    return facts if memory is None else facts | {"memory_ratio": memory.value, "memory_ratio_ci95": (memory.low, memory.high)}


def _unmeasured(row: JsonRow) -> str:
    return str(row["status"]) + (f" ({summary.split_remedy(row['reason'])[0]})" if row.get("reason") else "")


def _compared(
    key: str, base: JsonRow | None, new: JsonRow | None, runs: tuple[_Run, _Run], task: Mapping[str, Any], reran: Mapping[str, Reran | str] | None
) -> RowComparison:
    """One row of either or both runs, before any gate."""
    if base is None:
        assert new is not None
        return RowComparison(key, "added", _judged_by(new), f"status {new['status']}", new_p50_ms=summary.p50_ms(new))
    if new is None:
        return RowComparison(key, "removed", _judged_by(base), f"status {base['status']}", base_p50_ms=summary.p50_ms(base))
    change = None if _other_data(*runs) else summary.accuracy_change(summary.primary_score(new, task), summary.primary_score(base, task), task)
    facts: dict[str, Any] = {"base_p50_ms": summary.p50_ms(base), "new_p50_ms": summary.p50_ms(new), "accuracy_change_pp": change}
    facts["judged_by"] = _judged_by(new)
    before, after = summary.size_bytes(base), summary.size_bytes(new)
    facts["size_ratio"] = after / before if before and after else None
    if reran is not None:
        found = reran.get(key, "it was not measured again")
        if isinstance(found, str):
            return RowComparison(key, "not comparable", why=found, **facts)
        facts |= _reran_figures(found)
    else:
        unmeasured = [f"{side}: {_unmeasured(r)}" for side, r in (("base", base), ("new", new)) if not summary.measured([r])]
        differs = _differences(*(_conditions(r, run.report.get("environment") or {}) for r, run in zip((base, new), runs, strict=True)))
        if unmeasured or differs:
            return RowComparison(key, "not comparable", why="; ".join(unmeasured) or differs, **facts)
        facts |= _stored_figures(base, new, runs)
    return RowComparison(key, _verdict(facts), **facts)


def _judged_by(row: JsonRow) -> Literal["latency", "throughput"]:
    return "throughput" if row.get("scenario") == "offline" else "latency"


def _verdict(facts: dict[str, Any]) -> Verdict:
    """By the interval of what the row is judged by; says in `why` where an offline row has none."""
    of_throughput = facts["judged_by"] == "throughput"
    bounds = facts.get("throughput_ratio_ci95" if of_throughput else "ratio_ci95")
    if bounds is None:
        facts["why"] = "the throughput of its blocks is not stored, and an offline row is judged by that" if of_throughput else facts["why"]
        return "not comparable"
    fewer, more = ("slower", "faster") if of_throughput else ("faster", "slower")
    return cast(Verdict, more if bounds[0] > 1 else fewer if bounds[1] < 1 else "same within noise")


def _gated(row: RowComparison, task: Mapping[str, Any], gates: Gates) -> tuple[RowComparison, list[str]]:
    """The row with its regressions, and a sentence for each."""
    found: list[tuple[Regression, str]] = []
    limit = gates.max_latency_regression
    if limit is not None and row.judged_by == "latency" and row.ratio_ci95 and row.ratio_ci95[0] > 1 + limit:
        found.append(("latency", f"{units.factor(row.ratio)} the latency [{_bounds(row.ratio_ci95)}], more than {_percent(limit)} slower beyond noise"))
    limit = gates.max_throughput_regression
    if limit is not None and row.throughput_ratio_ci95 and row.throughput_ratio_ci95[1] < 1 - limit:
        bounds = _bounds(row.throughput_ratio_ci95)
        found.append(("throughput", f"{units.factor(row.throughput_ratio)} the throughput [{bounds}], more than {_percent(limit)} less beyond noise"))
    limit = gates.max_memory_regression
    if limit is not None and row.memory_ratio_ci95 and row.memory_ratio_ci95[0] > 1 + limit:
        found.append(("memory", f"{units.factor(row.memory_ratio)} the peak memory, more than {_percent(limit)} above the base"))
    if limit is not None and row.device_memory_ratio and row.device_memory_ratio > 1 + limit:
        found.append(("memory", f"{units.factor(row.device_memory_ratio)} the memory on the GPU, more than {_percent(limit)} above the base"))
    limit = gates.max_size_regression
    if limit is not None and row.size_ratio and row.size_ratio > 1 + limit:
        found.append(("size", f"{units.factor(row.size_ratio)} the size, more than {_percent(limit)} above the base"))
    worse = None if row.accuracy_change_pp is None else -row.accuracy_change_pp if task["higher_is_better"] else row.accuracy_change_pp
    limit = gates.max_accuracy_drop
    if limit is not None and worse is not None and worse > limit + 1e-9:  # so much may differ in the last bit
        found.append(("accuracy", f"{units.metric_name(task['primary'])} {units.change(row.accuracy_change_pp, task)}, more than {limit:g} worse"))
    undecided = _undecided(row, gates)
    why = "; ".join(filter(None, (row.why, *undecided.values())))
    row = replace(row, why=why, regressions=tuple(dict.fromkeys(kind for kind, _ in found)), undecided=tuple(undecided))
    return row, [f"{row.key}: {sentence}" for _, sentence in found]


def _undecided(row: RowComparison, gates: Gates) -> dict[Regression, str]:
    """Gates that an interval reaches beyond without lying beyond as a whole, with what to say of each: met, and no evidence that they hold."""
    found: dict[Regression, str] = {}
    measured = "" if row.lifetimes is None else f" ({row.lifetimes} lifetimes)"
    limit, bounds = gates.max_latency_regression, row.ratio_ci95
    if limit is not None and row.judged_by == "latency" and bounds and bounds[0] <= 1 + limit < bounds[1]:
        reach = f"the interval reaches {_points(bounds[1] - 1)} slower"
        found["latency"] = f"{reach}: a regression beyond {_percent(limit)} can't be ruled out{measured}"
    limit, bounds = gates.max_throughput_regression, row.throughput_ratio_ci95
    if limit is not None and bounds and bounds[0] < 1 - limit <= bounds[1]:
        reach = f"the interval reaches {_points(1 - bounds[0])} less throughput"
        found["throughput"] = f"{reach}: a regression beyond {_percent(limit)} can't be ruled out{measured}"
    return found


def _points(share: float) -> str:
    return f"{100 * share:.1f} %"


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _bounds(bounds: Bounds) -> str:
    return units.interval(list(bounds))


def _lost(row: RowComparison, base: JsonRow | None, new: JsonRow | None, reran: bool) -> str | None:
    """Why there are no new figures of a row that the base measured; None if there are, or if the base had none."""
    if base is None or not summary.measured([base]):
        return None
    if new is None:
        return "its row is gone"
    if reran and new["status"] != "failed":
        return row.why if row.verdict == "not comparable" else None
    return None if summary.measured([new]) else _unmeasured(new)


def _limits(gates: Gates) -> dict[str, float | None]:
    return {
        "latency": gates.max_latency_regression,
        "throughput": gates.max_throughput_regression,
        "memory": gates.max_memory_regression,
        "size": gates.max_size_regression,
        "accuracy": gates.max_accuracy_drop,
    }


def _held(row: RowComparison, gates: Gates) -> dict[str, Bounds | float | None]:
    """What the row has of each gate that was asked for and is about it; None where it could not be compared."""
    figures = {
        "latency": row.ratio_ci95,
        "throughput": row.throughput_ratio_ci95,
        "memory": row.memory_ratio_ci95,
        "size": row.size_ratio,
        "accuracy": row.accuracy_change_pp,
    }
    return {name: figures[name] for name, limit in _limits(gates).items() if limit is not None and (name != "latency" or row.judged_by == "latency")}


def _nothing_compared(rows: Sequence[RowComparison], gates: Gates) -> list[str]:
    """Gates of which nothing could be compared: silence is no pass."""
    return [
        f"no row's {name} could be compared, so the {name} gate cannot be said to hold"
        for name, limit in _limits(gates).items()
        if limit is not None and all(_held(row, gates).get(name) is None for row in rows)
    ]


def _resolved(report: Report) -> dict[str, str]:
    return dict(summary.flatten(report.get("recipe") or {}))


def _recipe_changes(base: Report, new: Report) -> list[str]:
    before, after = _resolved(base), _resolved(new)
    return [f"{k}: {before.get(k, 'absent')} → {after.get(k, 'absent')}" for k in dict.fromkeys([*before, *after]) if before.get(k) != after.get(k)]


def _other_data(base: _Run, new: _Run) -> bool:
    """Whether accuracies were taken on other images."""
    before, after = ((run.report.get("recipe") or {}).get("data") for run in (base, new))
    return before is not None and after is not None and before != after


def check_same_recipe(base: Report, new: Report) -> None:
    """Raises UsageError: runs of recipes with other names, or scored by another metric, whose rows mean different things."""
    names = [(report.get("recipe") or {}).get("name") for report in (base, new)]
    if None not in names and names[0] != names[1]:
        raise UsageError(f"wanted two runs of one recipe, found '{names[0]}' and '{names[1]}'", "deployopt bench BASE:ROW NEW:ROW compares any two artifacts")
    metrics = [summary.task_of(report)["primary"] for report in (base, new)]
    if metrics[0] != metrics[1]:
        raise UsageError(f"wanted two runs scored by one metric, found {metrics[0]} and {metrics[1]}", "compare runs of the same task")


def _notes(rows: Sequence[RowComparison], runs: tuple[_Run, _Run], reran: bool, images: str | None) -> list[str]:
    notes = [f"measured again with {images or SYNTHETIC_IMAGES}"] if reran else []
    compared = [r for r in rows if r.verdict in COMPARED]
    if not reran and compared and any(r.noise_floor is None for r in compared):
        notes.append(
            "the reports are from different process lifetimes, and no A/A repeats say how far those differ: intervals hold the noise inside each run only "
            "(set benchmark.aa_repeats in the recipe, or compare with --rerun)"
        )
    if _other_data(*runs):
        notes.append("accuracy is not compared: the runs were scored on other data")
    return notes


def chosen(rows: Sequence[str], base: Report, new: Report) -> list[str]:
    """Addresses of either run's rows, the base's first; only these `rows` if any are named.

    Raises:
        UsageError: a row that neither run has.
    """
    known = list(dict.fromkeys(summary.row_key(r) for report in (base, new) for r in report["rows"]))
    for row in rows:
        if row not in known:
            raise UsageError(plugins.unknown("row", row, known))
    return [key for key in known if not rows or key in rows]


def compare(
    base: Report,
    new: Report,
    base_dir: Path,
    new_dir: Path,
    gates: Gates | None = None,
    *,
    only: Sequence[str] = (),
    reran: Mapping[str, Reran | str] | None = None,
    images: str | None = None,
    plan: Plan | None = None,
) -> Comparison:
    """Compare the rows of two reports.

    Args:
        base, new: as `report.load` gives them.
        base_dir, new_dir: their run folders, for the stored block medians.
        only: addresses of the rows to compare; all if empty.
        reran: of `bench.rerun.rerun`: rows measured again, or why one was not; takes the place of the stored figures. Accuracy and size stay the reports'.
        images: what those were timed with; None: noise.
        plan: how they were timed; only told.

    A row that the base measured and the new run did not misses any gate, and a gate of which nothing could be compared is missed: silence is no pass.

    Raises:
        UsageError: runs of different recipes or tasks, or a row that neither has.
        ArtifactError: a samples file that is damaged or another row's.
    """
    check_same_recipe(base, new)
    task, gates = summary.task_of(new), gates or Gates()
    runs = (_Run(base, Path(base_dir)), _Run(new, Path(new_dir)))
    before, after = ({summary.row_key(r): r for r in report["rows"]} for report in (base, new))
    rows: list[RowComparison] = []
    misses: list[str] = []
    for key in chosen(only, base, new):
        row, sentences = _gated(_compared(key, before.get(key), after.get(key), runs, task, reran), task, gates)
        lost = _lost(row, before.get(key), after.get(key), reran is not None)
        if lost is not None and gates.asked and not gates.allow_missing:
            row = replace(row, regressions=(*row.regressions, "missing"))
            sentences.append(f"{key}: was measured in the base and is not now: {lost}")
        rows.append(row)
        misses += sentences
    misses += _nothing_compared(rows, gates)
    names = [str(report.get("run") or (report.get("recipe") or {}).get("name") or folder.name) for report, folder in runs]
    time, where = (new.get("finished"), new.get("environment")) if reran is None else (None, _environment(after, reran))
    notes = _notes(rows, runs, reran is not None, images)
    return Comparison(
        names[0],
        names[1],
        task,
        rows,
        gates,
        time or utc_now(),
        where or {},
        reran=reran is not None,
        rerun=None if plan is None else _how(plan, images),
        recipe_changes=_recipe_changes(base, new),
        notes=notes,
        misses=tuple(misses),
    )


def _environment(rows: Mapping[str, JsonRow], reran: Mapping[str, Reran | str]) -> dict[str, Any]:
    """This machine, with the versions of what opened the rows that were measured again."""
    return environment(distributions(row["backend"] for key, row in rows.items() if isinstance(reran.get(key), Reran)))


def _how(plan: Plan, images: str | None) -> dict[str, Any]:
    """A rerun's conditions that are the same for all rows; `threads` None: each base row's."""
    asked = {"lifetimes": plan.lifetimes, "precision": plan.precision, "budget_s": plan.budget, "seconds": plan.seconds, "threads": plan.threads}
    return {**asked, "images": images or SYNTHETIC_IMAGES}
