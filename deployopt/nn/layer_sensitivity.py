"""What INT8 costs layer by layer, and which layers to keep in float for an accuracy (mixed precision).

Every figure comes from the fake-quantised graph of the calibrated or trained network, in which any set of layers may compute in float.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import GraphModule

from deployopt.data import ImageSet
from deployopt.errors import StageFailed, UsageError
from deployopt.nn import evaluate
from deployopt.nn.losses import Distillation
from deployopt.nn.placement import layers
from deployopt.nn.quantizer import folded, insert_quantization, quantization
from deployopt.plugins import unknown
from deployopt.runtime.progress import Progress
from deployopt.tasks import Task

if TYPE_CHECKING:
    from deployopt.nn.models import Network

TIMED = 8  # layers whose latency in float is measured: those with the most to gain
LEAST_COST = 0.01  # of the INT8 latency: a difference below it is noise


class Score(NamedTuple):
    """How far a network's outputs are from its float parent's, and how good they are.

    Attributes:
        distance: mean KL divergence in nats (classification) or mean squared error.
        primary: the task's headline metric.
    """

    distance: float
    primary: float


class LayerScores(NamedTuple):
    """One layer's sensitivity: `alone` with it as the only INT8 layer, `spared` with it as the only float one."""

    layer: str
    alone: Score
    spared: Score


Cost = Callable[[Sequence[str]], Mapping[str, float]]
"""Layers → share by which each of them, kept in float, lengthens the INT8 network's latency."""


def check_layers(network: Network, names: Collection[str]) -> None:
    """Raise UsageError for a name that is no Conv2d or Linear of the network; it says the nearest one."""
    available = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    for name in names:
        if name not in available:
            raise UsageError(f"mixed_precision: {unknown('layer', name, available)}", "name layers as the report's sensitivity table does")


class Study:
    """A quantised network with any set of layers in float, scored on validation images.

    Args:
        network: quantised; it stays as it is.
        reference: the float parent's outputs on `images`: float32 [N, K].

    Attributes:
        parent: the float parent's headline metric on all images.
        layers: those in INT8, in the network's order.
    """

    def __init__(self, network: Network, reference: NDArray[np.float32], images: ImageSet, task: Task, device: str) -> None:
        entry = quantization(network)
        assert entry is not None
        self._entry, self._folded = entry, folded(network)
        self._reference, self._images, self._task, self._device = reference, images, task, device
        self.parent = float(task.score(reference, images.targets)[task.primary])
        self.layers = tuple(layer.name for layer in layers(self._folded.graph) if layer.name in entry["sites"])

    def graph(self, float_layers: Collection[str]) -> GraphModule:
        """The network on the CPU with these layers in float, beside those that its lineage keeps so."""
        return insert_quantization(copy.deepcopy(self._folded), self._entry, float_layers)

    def score(self, float_layers: Collection[str], count: int | None = None) -> Score:
        """On the first `count` images, or on all. Raises StageFailed if outputs are not finite."""
        outputs = evaluate.outputs(self.graph(float_layers).to(self._device), self._images, device=self._device, count=count)
        if broken := evaluate.broken(outputs):
            others = f" beside {', '.join(sorted(float_layers))} in float" if len(float_layers) in (1, 2) else ""
            raise StageFailed(
                f"in INT8{others} the network's outputs on {broken} of {len(outputs)} validation images are NaN or infinite",
                "lower the stage's lr: training has let weights or scales grow without bounds",
            )
        reference, targets = self._reference[: len(outputs)], self._images.targets[: len(outputs)]
        distance = Distillation(temperature=1.0).distance(self._task.loss, torch.from_numpy(outputs), torch.from_numpy(reference))
        return Score(float(distance), float(self._task.score(outputs, targets)[self._task.primary]))

    def sensitivity(self, count: int, progress: Progress) -> list[LayerScores]:
        """Every layer's scores on the first `count` images, in the network's order."""
        found = []
        with progress.track("sensitivity", len(self.layers)) as bar:
            for name in self.layers:
                found.append(LayerScores(name, self.score([other for other in self.layers if other != name], count), self.score([name], count)))
                bar.advance(note=name)
        return found


def keep_few(
    study: Study,
    table: Sequence[LayerScores],
    whole: float,
    accepted: Callable[[Score], bool],
    cost: Cost,
    *,
    describe: Callable[[Score], str],
    option: str,
) -> dict[str, Any]:
    """A few layers to keep in float so that the validation score is accepted, chosen greedily: those that bring the outputs nearest to the parent's
    for each share of latency, until it is; then those without which it still is are returned to INT8. At least one layer stays in INT8.

    Each layer is judged by what it gains as the only float one. Fewer might do together, but 2^layers sets are too many to try.

    Args:
        whole: distance of the network with all layers in INT8, on the images of the table: gains are differences from it.
        describe: a score in words, option: the recipe's path of the limit that `accepted` holds scores to; for errors.

    Returns:
        {"float_layers", "latency_cost": {layer: share}, "trace": [{"layer", "kept" (False: returned to INT8), "distance", "primary", "accepted"}]};
        the trace begins with the whole INT8 network, layer None.

    Raises:
        StageFailed: no set that was tried and leaves a layer in INT8 is accepted; says the best.
    """
    trace: list[dict[str, Any]] = []

    def accepts(chosen: Collection[str], layer: str | None, kept: bool) -> bool:
        score = study.score(chosen)
        good = accepted(score)
        trace.append({"layer": layer, "kept": kept, **score._asdict(), "accepted": good})
        return good

    if accepts((), None, False):
        return {"float_layers": [], "latency_cost": {}, "trace": trace}
    by_gain = [row.layer for row in sorted(table, key=lambda row: row.spared.distance)]
    gains = {row.layer: max(0.0, whole - row.spared.distance) for row in table}
    costs = dict(cost(by_gain[:TIMED]))
    order = sorted(costs, key=lambda name: gains[name] / max(costs[name], LEAST_COST), reverse=True) + by_gain[TIMED:]
    chosen: list[str] = []
    for name in order[:-1]:  # all of them in float would be the float network under the name of INT8
        chosen.append(name)
        if accepts(chosen, name, True):
            break
    else:
        best = min(trace, key=lambda step: float(step["distance"]))
        reached = describe(Score(best["distance"], best["primary"]))
        raise StageFailed(
            f"no set of layers kept in float that leaves one in INT8 meets mixed_precision's accuracy; the best of {len(trace)} tried reaches {reached}",
            f"raise {option}, or leave this INT8 variant out",
        )
    for name in chosen[-2::-1]:  # without the last it was not accepted
        fewer = [other for other in chosen if other != name]
        if accepts(fewer, name, False):
            chosen = fewer
    return {"float_layers": chosen, "latency_cost": costs, "trace": trace}
