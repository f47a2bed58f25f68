"""FIXTURE DATA, NOT MEASUREMENTS: tiny run folders, as `deployopt compare` reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deployopt.runtime.hashing import sha256_file

KEY = "qat/onnxruntime/int8/b1"


def write(folder: Path, p50_ms: float, **changes: Any) -> Path:
    """A run with one measured row whose blocks scatter by 1 % around `p50_ms`; `changes` replace keys of the report."""
    folder.mkdir(parents=True)
    medians = [p50_ms * (1 + 0.01 * ((7 * i) % 11 - 5) / 5) for i in range(40)]
    row = {
        "variant": "qat",
        "backend": "onnxruntime",
        "precision": "int8",
        "batch": 1,
        "status": "ok",
        "provider": "CPU",
        "threads": 1,
        "artifact": {"path": "model.onnx", "sha256": "0" * 64, "bytes": 1000},
        "accuracy": {"primary": "top1", "top1": 0.98, "n": 500},
        "latency_ms": {"host": {"p50": p50_ms, "p50_ci95": [0.99 * p50_ms, 1.01 * p50_ms]}, "device": None},
        "samples": "samples.json",
    }
    report = {
        "schema": 1,
        "deployopt": "0.1.0",
        "run": folder.name,
        "recipe": {"name": "tiny"},
        "recipe_sha256": "ab" * 32,
        "environment": {"cpu": {"model": "CPU A", "cores": 2, "isa": ["avx2"]}, "gpus": []},
        "finished": "2026-01-01T00:00:00Z",
        "variants": [],
        "rows": [row],
        **changes,
    }
    (folder / "samples.json").write_text(json.dumps({"row": KEY, "host_block_medians": medians, "block_throughputs_per_s": [1000 / m for m in medians]}))
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def around(artifact: Path, **document: Any) -> Path:
    """The artifact's folder as a run whose only row is that artifact."""
    facts = {"path": artifact.name, "sha256": sha256_file(artifact), "bytes": artifact.stat().st_size}
    row = {"variant": "qat", "backend": "onnxruntime", "precision": "fp32", "batch": 1, "status": "ok", "artifact": facts}
    (artifact.parent / "report.json").write_text(json.dumps({"schema": 1, "variants": [], "rows": [row], **document}))
    return artifact.parent
