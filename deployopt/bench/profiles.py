"""Where the time of an artifact goes: its layers' times beside the latency that was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deployopt.artifact import Row
from deployopt.bench.harness import Failure, Group, Images, Measured
from deployopt.runtime.files import atomic_write_json
from deployopt.runtime.progress import Progress
from deployopt.runtime.session import LayerTime

PROFILED_MS = 200.0  # of inference, as measured; at least so many runs and at most so many:
FEWEST_RUNS, MOST_RUNS = 10, 200
SHOWN = 20  # layers that a row carries into a report; a file has them all
HOW = "by the runtime's own profiler, in a session of its own after the timed rounds; profiling slows a session down"

Profile = tuple[int, list[LayerTime]]  # runs, layers in the order of execution


def take(group: Group, images: Mapping[str, Images], batch: int, results: Mapping[str, Measured | Failure], progress: Progress) -> dict[str, Profile]:
    """Profiles of the subjects that were measured and whose runtime tells, by key.

    Args:
        images: for each subject, uint8 [n, H, W, C].
        results: of `Group.measure` at this batch size.
    """
    measured = {key: result for key, result in results.items() if isinstance(result, Measured) and key in images}
    profiles: dict[str, Profile] = {}
    with progress.track(f"profile layers, batch {batch}", len(measured)) as bar:
        for key, result in measured.items():
            runs = min(MOST_RUNS, max(FEWEST_RUNS, math.ceil(PROFILED_MS / result.host["p50"])))
            layers = group.profile(key, images[key], batch, runs)
            if layers:
                profiles[key] = (runs, layers)
            bar.advance(1, key)
    return profiles


def summarize(profile: Profile, shown: int | None = None) -> dict[str, Any]:
    """A profile as a row has it: {"runs", "how", "total_us", "precision_us": {"int8": …}, "layers": the slowest first, "others": those left out}.

    Args:
        shown: at most so many layers; None gives all.
    """
    runs, layers = profile
    by_precision: dict[str, float] = {}
    for layer in layers:
        by_precision[layer.precision] = by_precision.get(layer.precision, 0.0) + layer.time_us
    slowest = sorted(layers, key=lambda layer: -layer.time_us)
    kept, others = slowest[:shown], slowest[len(slowest[:shown]) :]
    return {
        "runs": runs,
        "how": HOW,
        "total_us": _rounded(sum(by_precision.values())),
        "precision_us": {name: _rounded(time_us) for name, time_us in by_precision.items()},
        "layers": [_json(layer) for layer in kept],
        "others": {"layers": len(others), "time_us": _rounded(sum(layer.time_us for layer in others))},
    }


def write(profile: Profile, row: Row, folder: Path) -> Path:
    """Write all layers of a row in the order of execution; returns the file."""
    runs, layers = profile
    path = folder / f"{row.file_name}.json"
    atomic_write_json(path, {"row": row.key, "unit": "us", "runs": runs, "how": HOW, "layers": [_json(layer) for layer in layers]})
    return path


def _json(layer: LayerTime) -> dict[str, Any]:
    return {**layer._asdict(), "nodes": list(layer.nodes), "time_us": _rounded(layer.time_us)}


def _rounded(time_us: float) -> float:
    return round(time_us, 2)
