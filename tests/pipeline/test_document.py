from typing import Any

from deployopt.pipeline.document import _noted


def row(precision: str, p50: float) -> dict[str, Any]:
    latency = {"host": {"p50": p50, "p50_ci95": [p50, p50]}, "device": None}
    return {"variant": "qat", "backend": "b", "precision": precision, "batch": 1, "status": "ok", "latency_ms": latency, "notes": ["first"], "verified": None}


def test_int8_slower_than_fp16_is_noted_in_its_row() -> None:
    fast, slow = _noted([row("fp16", 1.0), row("int8", 2.0)], [{"name": "qat", "parent": None}])
    assert fast["notes"] == ["first"]
    assert slow["notes"][0] == "first"
    assert slow["notes"][1].startswith("2.00x slower than qat in FP16")
