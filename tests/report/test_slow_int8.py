from __future__ import annotations

from typing import Any

from deployopt.report import slow_int8

VARIANTS = [{"name": "finetune", "parent": None}, {"name": "prune", "parent": "finetune"}, {"name": "qat", "parent": "prune"}]


def row(variant: str, precision: str, p50: float, **facts: Any) -> dict[str, Any]:
    latency = {"host": {"p50": p50, "p50_ci95": [0.98 * p50, 1.02 * p50]}, "device": None}
    return {"variant": variant, "backend": "tensorrt", "precision": precision, "batch": 1, "status": "ok", "latency_ms": latency, "verified": None, **facts}


def verified(**executed: int) -> dict[str, Any]:
    return {"quantized_layers": executed.get("int8", 0), "quantizable_layers": sum(executed.values()), "executed": executed}


def told(*rows: dict[str, Any]) -> list[str]:
    return [note for _, note in slow_int8.notes(rows, VARIANTS)]


def layer(name: str, kind: str, precision: str, time_us: float, *nodes: str) -> dict[str, Any]:
    return {"name": name, "kind": kind, "precision": precision, "time_us": time_us, "nodes": list(nodes)}


def test_int8_is_held_to_the_float_parent_of_the_same_layers() -> None:
    (note,) = told(row("finetune", "fp16", 3.0), row("prune", "fp16", 1.0), row("qat", "int8", 1.5, verified=verified(int8=19, fp32=2)))
    assert note == "1.50x slower than prune in FP16 at the same batch: 2 in fp32 of its 21 convolutions and matrix products"


def test_faster_or_within_noise_is_no_finding() -> None:
    half = row("prune", "fp16", 1.0)
    assert told(half, row("qat", "int8", 0.7)) == []
    assert told(half, row("qat", "int8", 1.03)) == []
    assert told(half, row("qat", "int8", 1.05)) != []


def test_only_like_is_compared_with_like() -> None:
    slow = row("qat", "int8", 2.0)
    assert told(row("prune", "fp16", 1.0, batch=8), row("prune", "fp16", 1.0, backend="openvino"), row("prune", "fp32", 1.0), slow) == []
    assert told(row("prune", "fp16", 1.0, sweep="offline"), row("prune", "fp16", 1.0, status="invalid"), slow) == []


def test_the_faster_of_fp16_and_bf16_counts() -> None:
    (note,) = told(row("prune", "fp16", 1.6), row("prune", "bf16", 1.0), row("qat", "int8_fp16", 2.0))
    assert note.startswith("2.00x slower than prune in BF16")


def test_a_profile_names_the_layers_and_their_share_also_from_another_batch() -> None:
    layers = [
        layer("conv1", "CaskConvolution", "int8", 40.0, "conv1"),
        layer("Reformatting CopyNode for Input 0", "Reformat", "fp16", 30.0),
        layer("add", "PointWise", "fp16", 20.0, "add1", "relu1"),
        layer("fc", "gemm", "fp32", 5.0, "fc"),
        layer("pool", "Pooling", "fp16", 5.0, "pool"),
    ]
    profiled = row("qat", "int8", 0.1, profile={"total_us": 100.0, "layers": layers})
    (note,) = told(row("prune", "fp16", 1.0, batch=8), profiled, row("qat", "int8", 2.0, batch=8, verified=verified(int8=21)))
    assert note.endswith(
        "60 % of its time at batch 1 goes into layers that are not INT8: Reformatting CopyNode for Input 0 (Reformat, fp16), add1 + relu1 (PointWise, fp16), "
        "fc (gemm, fp32) and 1 more"
    )


def test_what_cannot_be_told_is_said() -> None:
    half = row("prune", "fp16", 1.0)
    assert "not known" in told(half, row("qat", "int8", 2.0))[0]
    assert "what is between them" in told(half, row("qat", "int8", 2.0, verified=verified(int8=21)))[0]
    assert told(half, row("qat", "int8", 2.0, profile={"total_us": 1.0, "layers": [layer("a", "conv", "int8", 1.0)]}))[0].endswith("every layer runs in INT8")
