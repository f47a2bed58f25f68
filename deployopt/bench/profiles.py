"""Where the time of an artifact goes: the times of its layers, taken after it has been measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from deployopt.artifact import Row
from deployopt.bench.harness import Failure, Group, Images, Measured
from deployopt.runtime.progress import Progress
from deployopt.runtime.session import LayerTime

PROFILED_MS = 200.0  # of inference, by the median that was measured; at least so many runs and at most so many:
FEWEST_RUNS, MOST_RUNS = 10, 200
HOW = "by the runtime's own profiler, in a session of its own after the timed rounds"

Profile = dict[str, Any]  # as `Row.profile`


def take(group: Group, images: Mapping[str, Images], batch: int, results: Mapping[str, Measured | Failure], progress: Progress) -> dict[str, Profile | Failure]:
    """Profiles of the subjects that were measured and whose runtime tells, or why one could not be taken, by key.

    Args:
        images: for each subject, uint8 [n, H, W, C].
        results: of `Group.measure` at this batch size.
    """
    measured = {key: result for key, result in results.items() if isinstance(result, Measured) and key in images}
    profiles: dict[str, Profile | Failure] = {}
    with progress.track(f"profile layers, batch {batch}", len(measured)) as bar:
        for key, result in measured.items():
            runs = min(MOST_RUNS, max(FEWEST_RUNS, math.ceil(PROFILED_MS / result.host["p50"])))
            layers = group.profile(key, images[key], batch, runs)
            if layers:
                profiles[key] = layers if isinstance(layers, Failure) else summarize(layers, runs)
            bar.advance(1, key)
    return profiles


def summarize(layers: Sequence[LayerTime], runs: int) -> Profile:
    """A profile as a row has it.

    Returns:
        {"how": in words, "runs": that were profiled, "total_us": of all layers, "precision_us": {"int8": of the layers that compute in it, …},
        "layers": [a `LayerTime` …] in the order of execution}; times are of one inference.
    """
    by_precision: dict[str, float] = {}
    for layer in layers:
        by_precision[layer.precision] = by_precision.get(layer.precision, 0.0) + layer.time_us
    return {
        "how": HOW,
        "runs": runs,
        "total_us": _rounded(sum(by_precision.values())),
        "precision_us": {name: _rounded(time_us) for name, time_us in by_precision.items()},
        "layers": [{**layer._asdict(), "nodes": list(layer.nodes), "time_us": _rounded(layer.time_us)} for layer in layers],
    }


def with_profile(row: Row, found: Profile | Failure | None) -> Row:
    """The row with its profile, or with a note why it has none; as it is where its runtime does not tell."""
    if isinstance(found, Failure):
        return replace(row, notes=[*row.notes, f"its layers could not be timed: {found.reason}"])
    return replace(row, profile=found)


def _rounded(time_us: float) -> float:
    return round(time_us, 2)
