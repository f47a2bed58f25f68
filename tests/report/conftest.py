"""FIXTURE DATA, NOT MEASUREMENTS: a synthetic report of the shape a run writes, with every row status, for tests of renderers."""

import copy
import hashlib
from typing import Any

import numpy as np
import pytest

CLASSES = [str(i) for i in range(10)]
# p50 in ms at batch 1: {backend: {(variant, precision): p50}}; invented
P50 = {
    "torch": {("finetune", "fp32"): 4.9, ("prune", "fp32"): 3.1, ("qat", "fp32"): 5.8},
    "onnxruntime": {("finetune", "fp32"): 2.41, ("prune", "fp32"): 1.05, ("qat", "int8"): 0.62},
    "openvino": {("finetune", "fp32"): 2.02, ("finetune", "bf16"): 1.61, ("prune", "fp32"): 0.88, ("prune", "bf16"): 0.71, ("qat", "int8"): 0.255},
}
TOP1 = {"finetune": 0.9833, "prune": 0.9778, "qat": 0.9825}
BYTES = {
    ("finetune", "fp32"): 44_690_000,
    ("finetune", "bf16"): 44_690_000,
    ("prune", "fp32"): 16_930_000,
    ("prune", "bf16"): 16_930_000,
    ("qat", "int8"): 4_310_000,
}
NO_DRIVER = "no NVIDIA driver answers\n  → install the driver, or drop the backend from build.backends"


def _row(variant: str, backend: str, precision: str, batch: int, **facts: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "variant": variant,
        "backend": backend,
        "precision": precision,
        "batch": batch,
        "status": "ok",
        "target": "local",
        "provider": "CPU",
        "options": {},
        "threads": 2,
        "scenario": "single_stream",
        "reason": None,
        "artifact": None,
        "accuracy": None,
        "verified": None,
        "latency_ms": None,
        "samples": None,
        "throughput_per_s": None,
        "peak_memory_bytes": None,
        "speedup": None,
        "speedup_ci95": None,
        "speedup_best_float": None,
        "profile": None,
        "contract": None,
    }
    return {**row, **facts}


def _measured(variant: str, backend: str, precision: str, batch: int, *, p50: float, dense_p50: float) -> dict[str, Any]:
    key = f"{variant}-{backend}-{precision}-b{batch}"
    rng = np.random.default_rng(int(hashlib.sha256(key.encode()).hexdigest()[:8], 16))
    samples = p50 * (1 + rng.gamma(2.0, 0.02, 4000) - 0.033)
    quantiles = np.quantile(samples, np.linspace(0, 1, 21)).round(5).tolist()
    median = float(np.median(samples))
    host = {
        "n": 4000,
        "p50": median,
        "p90": float(np.quantile(samples, 0.9)),
        "p95": float(np.quantile(samples, 0.95)),
        "p99": float(np.quantile(samples, 0.99)),
        "mean": float(samples.mean()),
        "std": float(samples.std()),
        "p50_ci95": [median * 0.99, median * 1.011],
        "mad": 0.01 * median,
        "quantiles": quantiles,
    }
    speedup = dense_p50 / p50
    return _row(
        variant,
        backend,
        precision,
        batch,
        artifact={
            "path": f"06-build/{variant}-{backend}-{precision}.onnx",
            "sha256": "ab" * 32,
            "bytes": BYTES[variant, "int8" if variant == "qat" else precision],
        },
        accuracy={"primary": "top1", "top1": TOP1[variant], "n": 540, "agreement": 0.996, "max_abs_diff": 0.08},
        verified={"quantized_layers": 21, "quantizable_layers": 21, "executed": {"int8": 21}} if precision == "int8" else None,
        latency_ms={"host": host, "device": None},
        samples=f"samples/{key}.json",
        throughput_per_s=1000 * batch / median,
        peak_memory_bytes=210_000_000,
        speedup=speedup,
        speedup_ci95=[speedup * 0.985, speedup * 1.016],
        speedup_best_float=speedup / 1.1,
        profile=_profile(median, precision) if backend != "torch" and batch == 1 else None,
        contract={
            "clock": "perf_counter",
            "copies": "included",
            "warm_up": {"seconds": 0.31, "runs": 140, "settled": True},
            "blocks": 24,
            "iterations": 4000,
            "duration_s": 3.2,
            "interleaved_with": ["finetune/openvino/fp32/b1", "prune/openvino/fp32/b1"],
            "inputs": {"shape": [batch, 3, 32, 32], "buffers": 8},
            "threads": 2,
            "spread": {"mad_over_median": 0.01, "limit": 0.05},
            "flags": [],
        },
    )


def _profile(median_ms: float, precision: str) -> dict[str, Any]:
    """In the order of execution; 70 %, 25 % and, added by the runtime, 4 % of the median; the last 1 % is in FP32 whatever the row is."""
    total_us = 1000 * median_ms
    facts = [
        ("reorder", "Reorder", [], "fp32", 0.04),
        ("conv1/x", "Convolution", ["conv1", "relu1"], precision, 0.7),
        ("pool", "Pooling", ["pool"], "fp32", 0.01),
        ("fc", "MatMul", ["fc"], precision, 0.25),
    ]
    layers = [{"name": n, "kind": k, "nodes": nodes, "precision": p, "time_us": share * total_us, "calls": 1} for n, k, nodes, p, share in facts]
    return {
        "how": "by the runtime's own profiler, in a session of its own after the timed rounds",
        "runs": 50,
        "total_us": total_us,
        "precision_us": {precision: total_us} if precision == "fp32" else {"fp32": 0.05 * total_us, precision: 0.95 * total_us},
        "layers": layers,
    }


def _rows() -> list[dict[str, Any]]:
    rows = []
    for batch, factor in ((1, 1.0), (8, 6.1)):
        for backend, figures in P50.items():
            dense = figures["finetune", "fp32"] * factor
            rows += [_measured(v, backend, p, batch, p50=p50 * factor, dense_p50=dense) for (v, p), p50 in figures.items()]
        for variant, precision in (("finetune", "fp32"), ("finetune", "fp16"), ("prune", "fp32"), ("prune", "fp16"), ("qat", "int8")):
            rows.append(_row(variant, "tensorrt", precision, batch, status="unavailable", provider=None, reason=NO_DRIVER))
            artifact = {"path": f"06-build/{variant}-tensorrt_rtx-{precision}.engine", "sha256": "cd" * 32, "bytes": 5_120_000}
            built = {
                "status": "built",
                "artifact": artifact,
                "reason": NO_DRIVER,
                "verified": {"quantized_layers": 21, "quantizable_layers": 21, "executed": {}},
            }
            rows.append(_row(variant, "tensorrt_rtx", precision, batch, **(built if precision == "int8" else {**built, "verified": None})))
    rows.append(
        _row(
            "prune", "onnxruntime", "fp16", 1, status="failed", reason="the session's child died: SIGSEGV in libonnxruntime [core dumped]\n  → deployopt doctor"
        )
    )
    noisy = _measured("prune", "onnxruntime", "fp32", 8, p50=9.9, dense_p50=14.7)
    rows = [r for r in rows if (r["variant"], r["backend"], r["batch"]) != ("prune", "onnxruntime", 8)]
    return [
        *rows,
        {**noisy, "status": "invalid", "speedup": None, "speedup_ci95": None, "reason": "MAD/median 0.12 exceeds its limit 0.05: other load on the machine"},
    ]


def _curves(epochs: int, start: float, rate: float) -> list[dict[str, Any]]:
    return [
        {
            "phase": "finetune",
            "epoch": e,
            "train_loss": start * 0.6**e + 0.02,
            "validation_loss": start * 0.65**e + 0.06,
            "validation_top1": 0.985 - 0.25 * start * 0.5**e,
            "lr": rate * (1 - e / (epochs + 1)),
        }
        for e in range(1, epochs + 1)
    ]


def _quantization() -> dict[str, Any]:
    def score(distance: float, top1: float) -> dict[str, float]:
        return {"distance": distance, "primary": top1}

    layers = [("body.conv1", 0.04, 0.011), ("body.layer1.0.conv1", 0.002, 0.049), ("body.fc", 0.001, 0.05)]
    trace = [
        {"layer": None, "kept": False, **score(0.05, 0.975), "accepted": False},
        {"layer": "body.conv1", "kept": True, **score(0.011, 0.9806), "accepted": True},
    ]
    return {
        "float_layers": ["body.conv1"],
        "sensitivity": {
            "images": 57,
            "distance": "kl",
            "int8": score(0.05, 0.975),
            "float": score(0.001, 0.9806),
            "layers": [{"layer": name, "alone": score(alone, 0.9778), "spared": score(spared, 0.9806)} for name, alone, spared in layers],
        },
        "mixed_precision": {
            "backend": "onnxruntime",
            "batch": 1,
            "max_accuracy_drop_pp": 0.5,
            "parent": 0.9806,
            "float_layers": ["body.conv1"],
            "latency_cost": {"body.conv1": 0.052},
            "trace": trace,
        },
    }


def _variants() -> list[dict[str, Any]]:
    confusion = [[54 if i == j else 0 for j in range(10)] for i in range(10)]
    for truth, found, number in ((8, 1, 3), (9, 3, 2), (3, 9, 1), (4, 7, 1)):
        confusion[truth][found] += number
        confusion[truth][truth] -= number
    details = {"confusion": confusion, "classes": CLASSES}
    common = {"details": None, "record": {}}
    return [
        {
            **common,
            "name": "finetune",
            "parent": None,
            "stage": "finetune",
            "family": "float",
            "params": 11_173_962,
            "macs": 140_848_138,
            "size_bytes": 44_735_000,
            "seconds": 41.2,
            "accuracy": {"top1": 0.9861, "n": 360},
            "cached": True,
            "curves": _curves(8, 1.6, 0.05),
        },
        {
            **common,
            "name": "prune",
            "parent": "finetune",
            "stage": "prune",
            "family": "float",
            "params": 4_230_000,
            "macs": 56_200_000,
            "size_bytes": 16_950_000,
            "seconds": 28.9,
            "accuracy": {"top1": 0.9806, "n": 360},
            "cached": False,
            "curves": _curves(4, 0.7, 0.02),
        },
        {
            **common,
            "name": "qat",
            "parent": "prune",
            "stage": "qat",
            "family": "int8",
            "params": 4_230_000,
            "macs": 56_200_000,
            "size_bytes": 16_990_000,
            "seconds": 33.0,
            "accuracy": {"top1": 0.9833, "n": 360},
            "cached": False,
            "curves": _curves(2, 0.3, 0.005),
            "details": details,
            "record": {"quantization": _quantization()},
        },
    ]


def sample_report() -> dict[str, Any]:
    """The synthetic report, judged by the real rules."""
    from deployopt.report import verdict

    task = {"name": "classification", "primary": "top1", "unit": "", "higher_is_better": True}
    rows, variants = _rows(), _variants()
    limits = {"max_accuracy_drop_pp": 1.5, "min_speedup": 2.0}
    budget, recommended = verdict.judge(rows, variants, limits, task)
    return {
        "schema": 1,
        "deployopt": "0.1.0",
        "recipe": {"name": "resnet18_int8", "model": {"arch": "resnet18"}, "budget": limits},
        "recipe_sha256": "0" * 64,
        "environment": {
            "cpu": {"model": "Fixture CPU @ 2.50GHz", "cores": 2, "isa": ["avx2", "avx512f", "vnni", "amx_int8"]},
            "gpus": [],
            "python": "3.11.9",
            "os": "Linux 6.1 (Debian 12)",
            "versions": {"torch": "2.15.0", "onnxruntime": "1.24.0", "openvino": "2026.3.0", "tensorrt-rtx-cu13": "1.5.0"},
            "container": None,
            "utc": "2026-11-21T12:00:00Z",
        },
        "started": "2026-11-21T11:55:00Z",
        "finished": "2026-11-21T12:00:00Z",
        "task": task,
        "dataset": {"name": "digits", "train": 897, "validation": 360, "test": 540},
        "classes": CLASSES,
        "run": "resnet18_int8-20261121T115500Z-0123abcd",
        "steps": [
            {"id": "00-finetune", "stage": "finetune", "name": "finetune", "label": "", "seconds": 41.2, "cached": True, "status": "ok", "reason": None},
            {"id": "01-prune", "stage": "prune", "name": "prune", "label": "", "seconds": 28.9, "cached": False, "status": "ok", "reason": None},
        ],
        "variants": variants,
        "rows": rows,
        "budget": budget,
        "recommended": recommended,
    }


@pytest.fixture(scope="session")
def _sample() -> dict[str, Any]:
    return sample_report()


@pytest.fixture
def report(_sample: dict[str, Any]) -> dict[str, Any]:
    """A copy that a test may change."""
    return copy.deepcopy(_sample)
