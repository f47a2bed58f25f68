"""From the layer times of single inferences to a profile. Standard library, Python 3.8 syntax."""

from __future__ import annotations

import statistics
from typing import Dict, List, Sequence

from deployopt.runtime.session import LayerTime

WARM_UP_RUNS = 5  # before those that count


def typical(runs: Sequence[Sequence[LayerTime]]) -> List[LayerTime]:
    """The median over inferences of each layer's time, in the order in which they first ran.

    Args:
        runs: for each inference the layers as they ran; one that ran several times in it counts with the sum.
    """
    totals: Dict[str, List[float]] = {}
    first: Dict[str, LayerTime] = {}
    calls: Dict[str, int] = {}
    for position, run in enumerate(runs):
        for layer in run:
            times = totals.setdefault(layer.name, [0.0] * len(runs))
            times[position] += layer.time_us
            first.setdefault(layer.name, layer)
            calls[layer.name] = calls.get(layer.name, 0) + layer.calls
    return [layer._replace(time_us=statistics.median(totals[name]), calls=round(calls[name] / len(runs))) for name, layer in first.items()]
