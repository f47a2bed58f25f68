"""What the benchmarks of speed share: sessions on files, timed against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deployopt.bench.harness import Failure, Images, Measured, Settings, Subject, measure, speedup
from deployopt.bench.images import SYNTHETIC
from deployopt.bench.scenarios import Scenario, ScenarioName
from deployopt.bench.targets import opener
from deployopt.runtime.progress import SilentProgress
from deployopt.runtime.session import SessionOptions


class Pair(NamedTuple):
    """A ratio to tell: `slow`'s latency over `fast`'s, both keys of what was timed."""

    label: str
    slow: str
    fast: str


def interleaved(
    paths: Mapping[str, Path],
    pairs: Sequence[Pair],
    images: Images,
    *,
    source: str = SYNTHETIC,
    batch: int = 1,
    threads: int,
    scenario: ScenarioName = "single_stream",
    seconds: float,
    seed: int,
) -> dict[str, Any]:
    """One round: every file in a new process at one batch size, interleaved, and the ratios paired by block.

    Args:
        paths: by "backend/precision"; a precision that is none of ours names an INT8 file.
        images: [N, H, W, C]; `source` says of what.
        scenario: of "offline" the ratios are of throughputs.
    """
    asked, subjects = Scenario(scenario, threads), []
    for key, path in paths.items():
        backend, precision = key.split("/")
        options = asked.options(SessionOptions(precision="fp32" if precision == "fp32" else "int8"))
        subjects.append(Subject(key, opener(backend), path, options, scenario))
    measured = measure(subjects, images, Settings(min_seconds=seconds, seed=seed), SilentProgress(), batch=batch, source=source)
    found: dict[str, Any] = {"seed": seed, "batch": batch, "scenario": scenario, "rows": {key: _row(result) for key, result in measured.items()}, "ratios": {}}
    for label, slow, fast in pairs:
        a, b = measured.get(slow), measured.get(fast)
        if isinstance(a, Measured) and isinstance(b, Measured):
            found["ratios"][label] = speedup(a, b, seed)
    return found


def _row(result: Measured | Failure) -> dict[str, Any]:
    if isinstance(result, Failure):
        return {"failed": result.reason}
    return {
        "p50_ms": result.host["p50"],
        "throughput_per_s": result.throughput_per_s,
        "n": result.host["n"],
        "invalid": result.invalid,
        "block_medians_ms": result.block_medians_ms,
    }
