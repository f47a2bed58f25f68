"""Compare two runs row by row: what became faster or slower beyond noise, what cannot be compared and why, and whether a gate holds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from deployopt.errors import ArtifactError
from deployopt.report import summary, units
from deployopt.report.summary import JsonRow, Report
from deployopt.runtime.statistics import MINIMUM_BLOCKS, bootstrap_ratio

Verdict = Literal["faster", "slower", "same within noise", "not comparable", "added", "removed"]
Regression = Literal["latency", "accuracy", "status"]


@dataclass(frozen=True)
class RowComparison:
    """One row of both runs.

    Attributes:
        key: variant/backend/precision/bN.
        why: what differs, for "not comparable", or what is odd about the verdict.
        ratio: new median / base median of the host clock; above 1 is slower. ratio_ci95: its 95 % bootstrap interval.
        base_p50_ms, new_p50_ms: host clock.
        interval_from: "block medians", or "p50_ci95" where their files are missing (then wider than needed).
        accuracy_change_pp: new − base, percentage points for a fraction, else in the metric's unit.
        regressions: the gates this row misses.
    """

    key: str
    verdict: Verdict
    why: str = ""
    ratio: float | None = None
    ratio_ci95: tuple[float, float] | None = None
    base_p50_ms: float | None = None
    new_p50_ms: float | None = None
    interval_from: str | None = None
    accuracy_change_pp: float | None = None
    regressions: tuple[Regression, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """The whole of `deployopt compare`, JSON-able by `to_json`.

    Attributes:
        base, new: names of the runs.
        task: of the new run.
        gates: the thresholds asked for: {"max_latency_regression": 0.05 | None, "max_accuracy_drop": 0.5 | None}.
        misses: one sentence a missed gate; the gate is met if there is none.
    """

    base: str
    new: str
    task: Mapping[str, Any]
    rows: Sequence[RowComparison]
    gates: Mapping[str, float | None]
    misses: Sequence[str] = field(default_factory=tuple)

    @property
    def met(self) -> bool:
        return not self.misses

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(r), "ratio_ci95": list(r.ratio_ci95) if r.ratio_ci95 else None, "regressions": list(r.regressions)} for r in self.rows]
        return {
            "schema": 1,
            "base": self.base,
            "new": self.new,
            "task": dict(self.task),
            "rows": rows,
            "gate": {**self.gates, "met": self.met, "misses": list(self.misses)},
        }


class _Run(NamedTuple):
    report: Report
    folder: Path


def _versions(backend: str, environment: Mapping[str, Any]) -> dict[str, str]:
    """Versions of the distributions a backend runs on: onnxruntime and onnxruntime-gpu, tensorrt-cu12 but not tensorrt-rtx."""
    found = {}
    for name, version in (environment.get("versions") or {}).items():
        plain = str(name).replace("-", "_").lower()
        rest = plain.removeprefix(backend)
        if plain.startswith(backend) and (not rest or (rest[0] == "_" and not rest.startswith("_rtx"))):
            found[str(name)] = str(version)
    return found


def _conditions(row: JsonRow, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that must agree before two latencies may be compared."""
    contract = row.get("contract") or {}
    inputs = contract.get("inputs") or {}
    conditions: dict[str, Any] = {
        "CPU model": (environment.get("cpu") or {}).get("model"),
        "provider": row.get("provider"),
        "target": row.get("target"),
        "scenario": row.get("scenario"),
        "options": row.get("options") or {},
        "threads": row.get("threads"),
        "clock": contract.get("clock"),
        "copies": contract.get("copies"),
        "input shape": inputs.get("shape") or inputs.get("shapes"),
        "runtime version": _versions(row["backend"], environment),
    }
    if not str(row.get("provider")).startswith("CPU"):  # "CPU", "CPUExecutionProvider"
        gpus = [g if isinstance(g, Mapping) else {"name": g} for g in environment.get("gpus") or []]
        conditions["GPU model"] = [g.get("name") for g in gpus]
        conditions["driver"] = [g.get("driver") for g in gpus]
    return conditions


def _differences(base: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The conditions that differ, as prose; "" if none."""

    def show(value: Any) -> str:
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
        return text or "none"

    names = list(dict.fromkeys([*base, *new]))
    return "; ".join(f"{n}: {show(base.get(n))} → {show(new.get(n))}" for n in names if base.get(n) != new.get(n))


def _block_medians(row: JsonRow, folder: Path) -> list[float] | None:
    """Raw block medians in ms; None if the row has no file of them.

    Raises:
        ArtifactError: a file that lies outside the run folder, is not JSON or belongs to another row.
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
        samples = json.loads(file.read_text(encoding="utf-8"))
        blocks = [float(v) for v in samples["host_block_medians"]]
        owner = samples["row"]
    except (ValueError, KeyError, TypeError) as exc:
        raise ArtifactError(f"{file}: wanted {{'row', 'unit', 'host_block_medians'}}, found something else ({exc})", "run the benchmark again") from exc
    if owner != summary.row_key(row):
        raise ArtifactError(f"{file}: wanted samples of {summary.row_key(row)}, found those of {owner}", "run the benchmark again")
    if not blocks or not all(math.isfinite(v) and v > 0 for v in blocks):
        raise ArtifactError(f"{file}: wanted block medians above zero, at least one", "run the benchmark again")
    return blocks


def _ratio(base: JsonRow, new: JsonRow, base_dir: Path, new_dir: Path) -> tuple[float, tuple[float, float] | None, str | None, str]:
    """(ratio new/base, its interval, where the interval comes from, a remark)."""
    before, after = _block_medians(base, base_dir), _block_medians(new, new_dir)
    if before and after:
        found = bootstrap_ratio(after, before, paired=False)
        few = min(len(before), len(after))
        remark = f"only {few} blocks: the interval under-covers, {MINIMUM_BLOCKS} are needed" if few < MINIMUM_BLOCKS else ""
        return found.value, (found.low, found.high), "block medians", remark
    ratio = float(summary.host(new)["p50"] / summary.host(base)["p50"])
    low_base, high_base = summary.host(base).get("p50_ci95") or (None, None)
    low_new, high_new = summary.host(new).get("p50_ci95") or (None, None)
    if not low_base or not high_base or not low_new or not high_new:
        return ratio, None, None, "no block medians and no interval of the median: noise is not known"
    # the quotient of the ends covers at least 95 %: both medians would have to err in opposite directions
    return ratio, (low_new / high_base, high_new / low_base), "p50_ci95", "block medians are missing; the interval is from each run's own and is wider"


def _compare_row(key: str, base: JsonRow, new: JsonRow, runs: tuple[_Run, _Run], task: Mapping[str, Any]) -> RowComparison:
    change = summary.accuracy_change(summary.primary_score(new, task), summary.primary_score(base, task), task)
    facts: dict[str, Any] = {"base_p50_ms": summary.p50_ms(base), "new_p50_ms": summary.p50_ms(new), "accuracy_change_pp": change}
    unmeasured = [
        f"{side}: {r['status']}" + (f" ({summary.split_remedy(r['reason'])[0]})" if r.get("reason") else "")
        for side, r in (("base", base), ("new", new))
        if not summary.measured([r])
    ]
    if unmeasured:
        return RowComparison(key, "not comparable", "; ".join(unmeasured), **facts)
    differs = _differences(*(_conditions(r, run.report.get("environment") or {}) for r, run in zip((base, new), runs, strict=True)))
    if differs:
        return RowComparison(key, "not comparable", differs, **facts)
    ratio, bounds, source, remark = _ratio(base, new, runs[0].folder, runs[1].folder)
    facts |= {"ratio": ratio, "ratio_ci95": bounds, "interval_from": source}
    if bounds is None:
        return RowComparison(key, "not comparable", remark, **facts)
    verdict: Verdict = "slower" if bounds[0] > 1 else "faster" if bounds[1] < 1 else "same within noise"
    return RowComparison(key, verdict, remark, **facts)


def _gated(
    row: RowComparison, newly_failed: str | None, task: Mapping[str, Any], *, latency: float | None, accuracy: float | None
) -> tuple[RowComparison, list[str]]:
    """The row with its regressions, and a sentence for each."""
    found: list[tuple[Regression, str]] = []
    if latency is not None and row.ratio_ci95 and row.verdict == "slower" and row.ratio_ci95[0] > 1 + latency:
        interval = units.interval(list(row.ratio_ci95))
        found.append(("latency", f"{row.key}: {units.factor(row.ratio)} the latency [{interval}], more than {100 * latency:g} % slower beyond noise"))
    worse = None if row.accuracy_change_pp is None else -row.accuracy_change_pp if task["higher_is_better"] else row.accuracy_change_pp
    if accuracy is not None and worse is not None and worse > accuracy + 1e-9:
        change = units.change(row.accuracy_change_pp, task)
        found.append(("accuracy", f"{row.key}: {units.metric_name(task['primary'])} {change}, more than {accuracy:g} worse"))
    if newly_failed is not None and (latency is not None or accuracy is not None):
        found.append(("status", f"{row.key}: was measured in the base and failed now: {newly_failed}"))
    return replace(row, regressions=tuple(kind for kind, _ in found)), [sentence for _, sentence in found]


def compare(
    base: Report, new: Report, base_dir: Path, new_dir: Path, *, max_latency_regression: float | None = None, max_accuracy_drop: float | None = None
) -> Comparison:
    """Compare the rows of two reports.

    Args:
        base, new: as `report.load` gives them.
        base_dir, new_dir: their run folders, for the stored block medians.
        max_latency_regression: share by which a row may become slower, 0.05 for 5 %; missed only where the whole 95 % interval lies above it.
        max_accuracy_drop: percentage points (the metric's unit if it is no fraction) by which a row may become worse.

    A row that was measured and now failed misses any gate, and a gate of which nothing could be compared is missed: silence is no pass.

    Raises:
        ArtifactError: a samples file that is damaged or another row's.
    """
    task = summary.task_of(new)
    if summary.task_of(base)["primary"] != task["primary"]:
        found = f"{summary.task_of(base)['primary']} and {task['primary']}"
        raise ArtifactError(f"wanted two runs scored by one metric, found {found}", "compare runs of the same task")
    runs = (_Run(base, Path(base_dir)), _Run(new, Path(new_dir)))
    before, after = ({summary.row_key(r): r for r in report["rows"]} for report in (base, new))
    rows: list[RowComparison] = []
    misses: list[str] = []
    for key in dict.fromkeys([*before, *after]):
        if key not in after:
            rows.append(RowComparison(key, "removed", f"status {before[key]['status']}", base_p50_ms=summary.p50_ms(before[key])))
            continue
        if key not in before:
            rows.append(RowComparison(key, "added", f"status {after[key]['status']}", new_p50_ms=summary.p50_ms(after[key])))
            continue
        failed = before[key]["status"] == "ok" and after[key]["status"] == "failed"
        reason = summary.split_remedy(after[key].get("reason"))[0] if failed else None
        row, sentences = _gated(
            _compare_row(key, before[key], after[key], runs, task), reason, task, latency=max_latency_regression, accuracy=max_accuracy_drop
        )
        rows.append(row)
        misses += sentences
    if max_latency_regression is not None and not any(r.verdict in {"faster", "slower", "same within noise"} for r in rows):
        misses.append("no row's latency could be compared, so the latency gate cannot be said to hold")
    if max_accuracy_drop is not None and all(r.accuracy_change_pp is None for r in rows):
        misses.append("no row's accuracy could be compared, so the accuracy gate cannot be said to hold")
    names = [str(report.get("run") or (report.get("recipe") or {}).get("name") or folder.name) for report, folder in runs]
    return Comparison(names[0], names[1], task, rows, {"max_latency_regression": max_latency_regression, "max_accuracy_drop": max_accuracy_drop}, tuple(misses))
