from typing import Any

import pytest

from deployopt.errors import DeployoptError, LackingEnvironment, StageFailed
from deployopt.report import summary, verdict

TASK = {"name": "classification", "primary": "top1", "unit": "", "higher_is_better": True}
VARIANTS = [
    {"name": "finetune", "parent": None, "stage": "finetune", "family": "float"},
    {"name": "prune", "parent": "finetune", "stage": "prune", "family": "float"},
    {"name": "qat", "parent": "prune", "stage": "qat", "family": "int8"},
]


def row(variant: str, precision: str, p50: float, top1: float, **facts: Any) -> dict[str, Any]:
    return {
        "variant": variant,
        "backend": "openvino",
        "precision": precision,
        "batch": 1,
        "status": "ok",
        "latency_ms": {"host": {"p50": p50}},
        "accuracy": {"top1": top1},
        "speedup": 2.0 / p50,
        "artifact": {"path": "a", "bytes": 1000},
        **facts,
    }


def rows() -> list[dict[str, Any]]:
    quantized = {"verified": {"quantized_layers": 21, "quantizable_layers": 21}}
    return [
        row("finetune", "fp32", 2.0, 0.98, backend="torch"),
        row("finetune", "fp32", 2.0, 0.98),
        row("prune", "fp32", 1.0, 0.975),
        row("qat", "int8", 0.25, 0.96, **quantized),
        row("qat", "int8", 1.0, 0.96, batch=8, **quantized),
    ]


def test_budget_met_by_the_fastest_row_within_it() -> None:
    budget, recommended = verdict.judge(rows(), VARIANTS, {"max_accuracy_drop_pp": 1.0, "min_speedup": 1.5}, TASK)
    assert budget["met"]
    assert not budget["violations"]
    assert recommended is not None
    assert (recommended["row"], recommended["within_budget"]) == (2, True)


def test_a_drop_of_exactly_the_limit_passes_and_a_little_more_does_not() -> None:
    assert verdict.judge(rows(), VARIANTS, {"max_accuracy_drop_pp": 2.0001, "min_speedup": 8}, TASK)[0]["met"]
    assert not verdict.judge(rows(), VARIANTS, {"max_accuracy_drop_pp": 1.99, "min_speedup": 8}, TASK)[0]["met"]


def test_budget_missed_names_the_nearest_row_and_each_limit_it_misses() -> None:
    budget, recommended = verdict.judge(rows(), VARIANTS, {"max_accuracy_drop_pp": 0.9, "min_speedup": 7.0, "max_size_bytes": 2000}, TASK)
    assert not budget["met"]
    assert recommended is not None
    assert not recommended["within_budget"]
    assert [v["limit"] for v in budget["violations"]] == ["min_speedup"]
    assert budget["violations"][0]["row"] == "prune/openvino/fp32/b1"
    assert "wanted at least 7.00x, found 2.00x" in budget["violations"][0]["sentence"]


@pytest.mark.parametrize(("limit", "value"), [("max_latency_ms", 0.1), ("max_size_bytes", 999), ("min_speedup", 9.0), ("max_accuracy_drop_pp", -1.0)])
def test_every_row_limit_can_be_missed(limit: str, value: float) -> None:
    budget, _ = verdict.judge(rows(), VARIANTS, {limit: value}, TASK)
    assert not budget["met"]
    assert budget["violations"][0]["limit"] == limit
    assert budget["violations"][0]["wanted"] == value


def test_torch_rows_neither_meet_a_budget_nor_are_recommended() -> None:
    only_torch = [row("finetune", "fp32", 0.01, 0.98, backend="torch")]
    budget, recommended = verdict.judge(only_torch, VARIANTS, {"max_latency_ms": 5}, TASK)
    assert not budget["met"]
    assert "no row outside PyTorch" in budget["violations"][0]["sentence"]
    assert recommended is None


def test_an_int8_row_with_too_few_int8_layers_is_a_violation_even_if_only_built() -> None:
    lazy = row("qat", "int8", 0.3, 0.97, status="built", latency_ms=None, backend="tensorrt_rtx", verified={"quantized_layers": 3, "quantizable_layers": 21})
    unknown = row("qat", "int8", 0.3, 0.97, backend="onnxruntime", verified=None)
    budget, _ = verdict.judge([*rows(), lazy, unknown], VARIANTS, {"min_quantized_layers": 0.9}, TASK)
    assert not budget["met"]
    assert [v["row"] for v in budget["violations"]] == ["qat/tensorrt_rtx/int8/b1", "qat/onnxruntime/int8/b1"]


def test_an_int8_artifact_that_nobody_could_verify_is_said_once_and_why_beside_verified_ones() -> None:
    unknown = {"backend": "tensorrt_rtx", "verified": None, "notes": ["INT8 is not verified: no inspector", "its Adds are not fused"]}
    several = [row("qat", "int8", 0.3, 0.97, batch=batch, **unknown) for batch in (1, 8)]
    failed = row("qat", "int8", 0.3, 0.97, backend="x", status="failed", verified=None, reason="no kernel\n  → use fp16")
    budget, _ = verdict.judge([*rows(), *several, failed], VARIANTS, {"min_quantized_layers": 0.9}, TASK)
    lead = "layers in INT8: wanted at least 90 % of layers, found not known"
    assert [v["sentence"] for v in budget["violations"]] == [
        f"{lead} (qat/tensorrt_rtx/int8/b1): INT8 is not verified: no inspector",
        f"{lead} (qat/x/int8/b1): no kernel",
    ]


@pytest.mark.parametrize(("quantized", "met"), [(19, True), (18, False)])
def test_layers_kept_in_float_on_purpose_are_not_asked_for(quantized: int, met: bool) -> None:
    mixed = row("qat", "int8", 0.3, 0.97, backend="x", verified={"quantized_layers": quantized, "quantizable_layers": 21, "kept_in_float": 2})
    budget, _ = verdict.judge([*rows(), mixed], VARIANTS, {"min_quantized_layers": 1.0}, TASK)
    assert budget["met"] == met
    assert summary.quantized_cell(mixed) == f"{quantized}/21, 2 kept in float"


def test_without_a_budget_at_most_a_point_is_lost_and_the_rule_is_said() -> None:
    budget, recommended = verdict.judge(rows(), VARIANTS, None, TASK)
    assert budget["met"]
    assert recommended is not None
    assert recommended["row"] == 2  # INT8 is faster, but loses 2 points
    assert "1 percentage point" in recommended["why"]


def test_the_smallest_batch_wins_over_the_least_latency() -> None:
    fast_at_eight = [*rows(), row("prune", "fp32", 0.1, 0.98, batch=8)]
    _, recommended = verdict.judge(fast_at_eight, VARIANTS, None, TASK)
    assert recommended is not None
    assert fast_at_eight[recommended["row"]]["batch"] == 1


def test_a_metric_where_less_is_better() -> None:
    task = {"name": "regression", "primary": "mae", "unit": "years", "higher_is_better": False}
    worse = row("qat", "int8", 0.2, 0, accuracy={"mae": 4.5})
    dense = row("finetune", "fp32", 2.0, 0, accuracy={"mae": 4.0})
    budget, recommended = verdict.judge([dense, worse], VARIANTS, {"max_accuracy_drop_pp": 0.4, "min_speedup": 2.0}, task)
    assert not budget["met"]
    assert recommended is not None
    assert any("years" in v["sentence"] for v in budget["violations"])


def test_headline_says_what_was_bought(report: dict[str, Any]) -> None:
    assert verdict.headline(report) == "ResNet-18 → pruned INT8 on openvino, batch 1: 7.9x faster than dense FP32, −0.08 pp top-1, 0.10x the size"


def test_headline_is_honest(report: dict[str, Any]) -> None:
    chosen = report["rows"][report["recommended"]["row"]]
    chosen.update(speedup=0.8, speedup_ci95=[0.78, 0.82])
    assert "not faster than dense FP32" in verdict.headline(report)
    chosen.update(speedup=1.01, speedup_ci95=[0.97, 1.04])
    assert "within noise" in verdict.headline(report)
    report["budget"]["met"] = False
    assert verdict.headline(report).endswith("the budget is missed")
    report["recommended"] = None
    assert "no deployable row was measured" in verdict.headline(report)


@pytest.mark.parametrize("status", ["ok", "built", "failed", "invalid"])
def test_int8_that_nobody_could_verify_is_a_violation(status: str) -> None:
    unknown = row("qat", "int8", 0.3, 0.97, status=status, verified=None)
    budget, _ = verdict.judge([*rows()[:3], unknown], VARIANTS, {"min_quantized_layers": 0.9}, TASK)
    assert [v["sentence"] for v in budget["violations"]] == ["layers in INT8: wanted at least 90 % of layers, found not known (qat/openvino/int8/b1)"]


def test_int8_that_is_unavailable_here_is_no_violation() -> None:
    absent = row("qat", "int8", 0.3, 0.97, status="unavailable", latency_ms=None, verified=None)
    assert verdict.judge([*rows()[:3], absent], VARIANTS, {"min_quantized_layers": 0.9}, TASK)[0]["met"]


def test_a_failed_int8_row_counts_with_what_was_verified() -> None:
    failed = row("qat", "int8", 0.3, 0.97, status="failed", latency_ms=None, backend="x", verified={"quantized_layers": 3, "quantizable_layers": 21})
    budget, _ = verdict.judge([*rows(), failed], VARIANTS, {"min_quantized_layers": 0.9}, TASK)
    assert [v["row"] for v in budget["violations"]] == ["qat/x/int8/b1"]


@pytest.mark.parametrize(
    ("states", "error"),
    [
        (["failed", "unavailable", "failed"], StageFailed),
        (["failed", "built", "invalid"], StageFailed),
        (["unavailable", "unavailable"], LackingEnvironment),
        (["ok", "failed", "unavailable"], None),
        (["built", "unavailable"], None),
        (["invalid"], None),
        ([], None),
    ],
)
def test_a_run_that_left_nothing_to_deploy_ends_in_an_error_that_says_why(states: list[str], error: type[DeployoptError] | None) -> None:
    baselines = [row("finetune", "fp32", 2.0, 0.98, backend=backend) for backend in ("torch", "torch-compile")]
    ended = [row("qat", "int8", 1.0, 0.9, batch=i, status=state, reason="no driver\n  → install one") for i, state in enumerate(states, 1)]
    steps = [{"id": f"04-build-{i}", "stage": "build", "status": state, "reason": None} for i, state in enumerate(states)]
    measured, unmeasured = verdict.shortfall({"rows": [*baselines, *ended]}), verdict.shortfall({"rows": [], "steps": steps})
    assert type(measured) is type(unmeasured) is (error or type(None))
    if measured is not None and unmeasured is not None:
        assert f"{states.count('failed') or 2} {'failed' if 'failed' in states else 'unavailable'}" in measured.message
        assert "qat/openvino/int8/b1" in measured.message
        assert "no driver" in measured.message
        assert measured.remedy == "install one"
        assert "04-build-0" in unmeasured.message
        assert unmeasured.remedy
