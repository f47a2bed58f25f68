"""What the steps left → the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deployopt import __version__, report
from deployopt.bench.environment import utc_now
from deployopt.pipeline.planning import Plan
from deployopt.report import slow_int8, summary, verdict
from deployopt.stages import Point, StepOutput


def assemble(
    planned: Plan, outputs: Sequence[StepOutput], data: Mapping[str, Any], where: Mapping[str, Any], started: str, run: str, sha: str
) -> dict[str, Any]:
    task = planned.task
    variants = [_variant(o, p) for o in outputs for p in o.point if p.kind == "torch" and p.fans_out]
    rows = _noted([row for o in outputs for row in o.record.get("rows", [])], variants)
    facts = {"name": planned.recipe.task, "primary": task.primary, "unit": task.unit, "higher_is_better": task.higher_is_better}
    measured = any("rows" in o.record for o in outputs)
    limits = planned.resolved["budget"] if measured else {}  # nothing to judge in a run that ends before it measures
    budget, recommended = verdict.judge(rows, variants, limits, facts)
    return {
        "schema": report.SCHEMA,
        "deployopt": __version__,
        "run": run,
        "recipe": dict(planned.resolved),
        "recipe_sha256": sha,
        "environment": dict(where),
        "started": started,
        "finished": utc_now(),
        "task": facts,
        **data,
        "steps": [
            {
                "id": o.step,
                "stage": o.stage,
                "name": s.entry_name,
                "label": s.expansion.label,
                "seconds": round(o.seconds, 2),
                "cached": o.cached,
                "status": o.record.get("status", "ok"),
                "reason": o.record.get("reason"),
            }
            for s, o in zip(planned.steps, outputs, strict=True)
        ],
        "variants": variants,
        "rows": rows,
        "budget": budget,
        "recommended": recommended,
    }


def _noted(rows: Sequence[dict[str, Any]], variants: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with a note on those that are INT8 and slower than 16-bit floats."""
    found = {summary.row_key(row): note for row, note in slow_int8.notes(rows, variants)}
    return [{**row, "notes": [*row["notes"], found[key]]} if (key := summary.row_key(row)) in found else row for row in rows]


def _variant(output: StepOutput, point: Point) -> dict[str, Any]:
    record = output.record
    own = ("params", "macs", "size_bytes", "accuracy", "parent", "curves", "details")
    return {
        "name": point.variant,
        "stage": output.stage,
        "family": point.family,
        **{name: record.get(name) for name in own},
        "seconds": round(output.seconds, 2),
        "cached": output.cached,
        "record": {k: v for k, v in record.items() if k not in own},
    }
