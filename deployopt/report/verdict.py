"""Is the budget met, which row is recommended, and the one sentence that says what the run bought. Pure functions over the report's JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from deployopt.artifact import INT8_PRECISIONS, NOT_VERIFIED, TORCH, TORCH_COMPILE, quantized_share
from deployopt.errors import DeployoptError, LackingEnvironment, StageFailed
from deployopt.report import summary, units
from deployopt.report.summary import JsonRow

DEFAULT_DROP_PP = 1.0  # without a budget: what people call "no loss" for INT8 (MLPerf's 99 % class)


class Limit(NamedTuple):
    """A limit on one figure of a row. `upper`: the figure may not exceed `wanted`; else it may not fall below."""

    name: str
    wanted: float
    figure: Callable[[JsonRow], float | None]
    upper: bool
    show: Callable[[float | None], str]
    noun: str

    def miss(self, row: JsonRow) -> float:
        """0 if the row keeps the limit, else how far off it is, relative to the limit; infinite if the figure is not known."""
        found = self.figure(row)
        if found is None:
            return float("inf")
        excess = found - self.wanted if self.upper else self.wanted - found
        return max(0.0, excess) / max(abs(self.wanted), 1e-9)

    @property
    def bound(self) -> str:
        return f"{'at most' if self.upper else 'at least'} {self.show(self.wanted)}"

    def violation(self, row: JsonRow | None) -> dict[str, Any]:
        """The miss as JSON, its `sentence` ready to print."""
        found = None if row is None else self.figure(row)
        bound = self.bound
        if row is None:
            sentence = f"{self.noun}: wanted {bound}, but no row outside PyTorch was measured"
            return {"limit": self.name, "wanted": self.wanted, "found": None, "row": None, "sentence": sentence}
        key = summary.row_key(row)
        what = "not known" if found is None else self.show(found)
        return {"limit": self.name, "wanted": self.wanted, "found": found, "row": key, "sentence": f"{self.noun}: wanted {bound}, found {what} ({key})"}


def _percent(value: float | None) -> str:
    return units.UNKNOWN if value is None else f"{100 * value:.0f} % of layers"


def _row_limits(budget: Mapping[str, Any], reference: float | None, task: Mapping[str, Any]) -> list[Limit]:
    def drop(row: JsonRow) -> float | None:
        return summary.accuracy_drop(summary.primary_score(row, task), reference, task)

    def show_drop(value: float | None) -> str:
        return units.UNKNOWN if value is None else f"{value:.2f} pp" if units.is_fraction(task) else f"{value:.3f} {task['unit']}"

    known: list[tuple[str, Callable[[JsonRow], float | None], bool, Callable[[float | None], str], str]] = [
        ("max_accuracy_drop_pp", drop, True, show_drop, f"drop in {units.metric_name(task['primary'])}"),
        ("min_speedup", lambda row: row.get("speedup"), False, units.factor, "speed-up over dense FP32"),
        ("max_latency_ms", summary.p50_ms, True, units.milliseconds, "latency p50"),
        ("max_size_bytes", summary.size_bytes, True, units.size, "size"),
    ]
    return [Limit(name, budget[name], figure, upper, show, noun) for name, figure, upper, show, noun in known if budget.get(name) is not None]


def _candidates(rows: Sequence[JsonRow]) -> list[JsonRow]:
    """Measured rows that can be deployed: PyTorch eager is a baseline, not a candidate, and budgets mean the run's own single stream."""
    return [r for r in summary.own(summary.measured(rows)) if r["backend"] not in (TORCH, TORCH_COMPILE)]


def _fastest(rows: Sequence[JsonRow]) -> JsonRow:
    """The least p50 at the smallest batch among `rows`."""
    return min(rows, key=lambda r: (r["batch"], summary.p50_ms(r)))


def _nearest(rows: Sequence[JsonRow], limits: Sequence[Limit]) -> JsonRow:
    """At the smallest batch, the row that misses the limits by the least in sum; the fastest of equals."""
    smallest = min(r["batch"] for r in rows)
    return min((r for r in rows if r["batch"] == smallest), key=lambda r: (sum(limit.miss(r) for limit in limits), summary.p50_ms(r)))


def judge(
    rows: Sequence[JsonRow], variants: Sequence[Mapping[str, Any]], budget: Mapping[str, Any] | None, task: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Judge the rows against a recipe's budget.

    Args:
        rows, variants, task: as in report.json.
        budget: the recipe's section; absent keys and None set no limit.

    Returns:
        budget: {"met", "limits", "violations": [{"limit", "wanted", "found", "row", "sentence"}]}; met without limits.
        recommended: {"row": index, "why", "within_budget"}, or None if no row outside PyTorch was measured.
    """
    wanted = {name: value for name, value in (budget or {}).items() if value is not None}
    reference = summary.dense_score(rows, variants, task)
    limits = _row_limits(wanted, reference, task)
    candidates = _candidates(rows)
    within = [r for r in candidates if not any(limit.miss(r) for limit in limits)]

    violations: list[dict[str, Any]] = []
    if limits and not within:
        nearest = _nearest(candidates, limits) if candidates else None
        violations += [limit.violation(nearest) for limit in limits if nearest is None or limit.miss(nearest)]
    violations += _quantization_violations(rows, wanted.get("min_quantized_layers"))

    verdict = {"met": not violations and bool(within or not wanted), "limits": wanted, "violations": violations}
    if not verdict["met"] and not violations:  # only min_quantized_layers was given, and nothing was measured
        violations.append({"limit": "measured", "wanted": 1, "found": 0, "row": None, "sentence": "no row outside PyTorch was measured"})
    return verdict, _recommend(rows, candidates, within, limits, reference=reference, task=task)


def limit_sentences(budget: Mapping[str, Any], task: Mapping[str, Any]) -> list[str]:
    """A budget's limits in words: "speed-up over dense FP32 at least 2.00x"."""
    limits = _row_limits(budget, None, task)
    if budget.get("min_quantized_layers") is not None:
        limits.append(_quantization_limit(budget["min_quantized_layers"]))
    return [f"{limit.noun} {limit.bound}" for limit in limits]


def _quantization_limit(share: float) -> Limit:
    return Limit("min_quantized_layers", share, lambda row: quantized_share(row.get("verified")), False, _percent, "layers in INT8")


def _quantization_violations(rows: Sequence[JsonRow], share: float | None) -> list[dict[str, Any]]:
    """Of every INT8 artifact below the limit, measured or not, or of which nobody could tell; those for backends that are lacking here are not judged."""
    if share is None:
        return []
    limit = _quantization_limit(share)
    artifacts: dict[tuple[str, ...], JsonRow] = {}  # the first row of each: batch sizes share what was verified
    for row in summary.own(rows):
        if row["precision"] in INT8_PRECISIONS and row["status"] != "unavailable":
            artifacts.setdefault((row["variant"], row["backend"], row["precision"]), row)
    return [_explained(limit.violation(row), row) for row in artifacts.values() if limit.miss(row)]


def _explained(violation: dict[str, Any], row: JsonRow) -> dict[str, Any]:
    """With why the row's layers could not be told, if so."""
    if violation["found"] is not None:
        return violation
    noted = next((note for note in row.get("notes") or [] if note.startswith(NOT_VERIFIED)), None)
    why = noted or (summary.split_remedy(row["reason"])[0] if row.get("reason") else None)
    return {**violation, "sentence": f"{violation['sentence']}: {why}"} if why else violation


def _recommend(
    rows: Sequence[JsonRow],
    candidates: Sequence[JsonRow],
    within: Sequence[JsonRow],
    limits: Sequence[Limit],
    *,
    reference: float | None,
    task: Mapping[str, Any],
) -> dict[str, Any] | None:
    if not candidates:
        return None
    if limits and within:
        row, kept, why = _fastest(within), True, "fastest row within the budget at the smallest batch"
    elif limits:
        row, kept = _nearest(candidates, limits), False
        missed = ", ".join(limit.name for limit in limits if limit.miss(row))
        why = f"no row is within the budget; this one is nearest and misses {missed}"
    else:
        # 1 point of a fraction, else 1 % of the dense value: metrics with a unit have no points
        allowed = DEFAULT_DROP_PP if units.is_fraction(task) else abs(reference or 0.0) * 0.01
        rule = "1 percentage point" if units.is_fraction(task) else f"1 % in {units.metric_name(task['primary'])}"
        drops = [(r, summary.accuracy_drop(summary.primary_score(r, task), reference, task)) for r in candidates]
        accurate = [r for r, drop in drops if drop is not None and drop <= allowed + 1e-9]
        if accurate:
            row, kept, why = _fastest(accurate), True, f"no limits on rows in the recipe: fastest row that loses at most {rule} against dense"
        else:
            row, kept = max(candidates, key=lambda r: _goodness(r, task)), True
            why = f"no limits on rows in the recipe, and no row loses at most {rule} against dense: the most accurate row"
    return {"row": next(i for i, r in enumerate(rows) if r is row), "why": why, "within_budget": kept}


def shortfall(report: Mapping[str, Any]) -> DeployoptError | None:
    """The error that a run ends in which left nothing valid to deploy; None if it left something, or was not asked to build anything.

    Returns:
        StageFailed if a build or a measurement failed, LackingEnvironment if this machine lacks every backend. A run whose rows are all built ahead of
        time, or too disturbed to count, is neither: its artifacts are there.
    """
    rows = [r for r in report["rows"] if r["backend"] not in (TORCH, TORCH_COMPILE)]
    ended = [(summary.row_key(r), r) for r in rows] or [(s["id"], s) for s in report.get("steps") or [] if s["stage"] == "build"]
    states = Counter(str(found["status"]) for _, found in ended)
    if not states or states["ok"] or not (states["failed"] or states.keys() == {"unavailable"}):
        return None
    worst = "failed" if states["failed"] else "unavailable"
    where, first = next((name, found) for name, found in ended if found["status"] == worst)
    reason, remedy = summary.split_remedy(first.get("reason"))
    counted = ", ".join(f"{number} {state}" for state, number in states.items())
    message = f"wanted an artifact to deploy, found {counted}; {where} {worst}: {reason}"
    if worst == "failed":
        return StageFailed(message, remedy or "the run's log.txt says more; the same command builds what failed again")
    return LackingEnvironment(message, remedy or "`deployopt doctor` says what this machine can build and run, and what to install")


def _goodness(row: JsonRow, task: Mapping[str, Any]) -> tuple[float, float]:
    """Sorts rows by accuracy, then speed; greater is better."""
    value = summary.primary_score(row, task)
    score = float("-inf") if value is None else value if task["higher_is_better"] else -value
    return score, -(summary.p50_ms(row) or 0.0)


def headline(report: Mapping[str, Any]) -> str:
    """The summary sentence: what the recommended row buys over dense FP32 on the same backend and batch.

    Says so where nothing was measured, where nothing is faster, where noise hides the difference and where the budget is missed.
    """
    rows, variants, task = report["rows"], report["variants"], summary.task_of(report)
    model = summary.model_name(report)
    recommended = report.get("recommended")
    if not recommended:
        states = ", ".join(f"{sum(r['status'] == s for r in rows)} {s}" for s in dict.fromkeys(r["status"] for r in rows))
        return f"{model}: no deployable row was measured ({states or 'no rows'})"
    row = rows[recommended["row"]]
    dense = summary.dense_row(rows, variants, row["backend"], row["batch"])
    sentence = f"{model} → {summary.describe(row, variants)} on {row['backend']}, batch {row['batch']}: {_speed_phrase(row, dense)}"
    difference = summary.accuracy_change(summary.primary_score(row, task), summary.dense_score(rows, variants, task), task)
    if row is not dense and difference is not None:
        unit = "pp" if units.is_fraction(task) else task["unit"]
        sentence += f", {units.signed(difference, 2 if units.is_fraction(task) else 3)} {unit} {units.metric_name(task['primary'])}"
    size, dense_size = summary.size_bytes(row), summary.size_bytes(dense) if dense else None
    if row is not dense and size and dense_size:
        sentence += f", {size / dense_size:.2f}x the size"
    if not (report.get("budget") or {}).get("met", True):
        sentence += "; the budget is missed"
    return sentence


def _speed_phrase(row: JsonRow, dense: JsonRow | None) -> str:
    speedup, bounds = row.get("speedup"), row.get("speedup_ci95")
    if row is dense:
        return f"nothing recommended is faster than dense FP32 itself ({units.milliseconds(summary.p50_ms(row))})"
    if speedup is None:
        return f"{units.milliseconds(summary.p50_ms(row))} (dense FP32 was not measured there)"
    if bounds and bounds[0] <= 1 <= bounds[1]:
        return f"as fast as dense FP32 within noise ({units.factor(speedup)}, 95 % interval {units.interval(bounds)})"
    if speedup <= 1:
        return f"not faster than dense FP32 ({units.factor(speedup)})"
    return f"{units.significant(speedup, 2)}x faster than dense FP32"
