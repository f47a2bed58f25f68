"""A/A repeats: how far an artifact differs from itself, inside one interleaved run and between process lifetimes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from deployopt.bench.harness import Failure, Group, Images, Measured, Settings, Subject, speedup
from deployopt.runtime.progress import Progress


def aa_repeats(
    subject: Subject, first: Mapping[int, Measured | Failure], repeats: int, settings: Settings, images: Images, progress: Progress
) -> dict[int, dict[str, Any]]:
    """Time the subject against itself: two new processes a repeat, interleaved with each other. Invalid measurements are left out.

    Args:
        first: what it measured already, by batch size; sizes without valid figures are not repeated.
        images: uint8 [n, H, W, C].

    Returns:
        For each batch size with at least two valid lifetimes, a row's `noise`: {"p50_ms": and "peak_memory_bytes": one for each process lifetime,
        `first` included, "same_rounds": ratios of two processes in the same rounds}.
    """
    lifetimes = {batch: [m] for batch, m in first.items() if isinstance(m, Measured) and m.invalid is None}
    ratios: dict[int, list[float]] = {batch: [] for batch in lifetimes}
    twins = [replace(subject, key=f"{subject.key}#{i}") for i in (1, 2)]
    for repeat in range(repeats if lifetimes else 0):
        with Group(twins, replace(settings, seed=settings.seed + repeat + 1), progress) as group:
            for batch in lifetimes:
                pair = group.measure({twin.key: images for twin in twins}, batch, "test split").values()
                valid = [m for m in pair if isinstance(m, Measured) and m.invalid is None]
                lifetimes[batch] += valid
                if len(valid) == len(twins):
                    ratios[batch].append(speedup(valid[0], valid[1])[0])
    return {batch: _noise(measured, ratios[batch]) for batch, measured in lifetimes.items() if len(measured) > 1}


def _noise(lifetimes: Sequence[Measured], ratios: Sequence[float]) -> dict[str, Any]:
    peaks = [m.peak_memory_bytes for m in lifetimes]
    return {"p50_ms": [m.host["p50"] for m in lifetimes], "peak_memory_bytes": None if None in peaks else peaks, "same_rounds": list(ratios)}
