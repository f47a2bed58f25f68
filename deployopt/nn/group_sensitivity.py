"""How much each group of channels matters by itself: the validation score after cutting it alone, without training."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from deployopt.data import ImageSet
from deployopt.nn import evaluate, pruning
from deployopt.nn.models import Network
from deployopt.nn.pruning import Cuts, Shares
from deployopt.runtime.progress import Progress, SilentProgress
from deployopt.tasks import Task

UNIFORM_WEIGHT = 0.01  # of a uniform cut beside the losses: orders what loses nothing


def scan(
    network: Network, cuts: Cuts, images: ImageSet, task: Task, ratios: Sequence[float], *, device: str = "cpu", progress: Progress | None = None
) -> dict[str, Any]:
    """The task's primary score on `images` with one group of `cuts` cut at a time, by each share in `ratios`.

    `network` stays as it is. A share that is less than a channel cuts one.

    Returns:
        {"metric", "n": images, "whole": the uncut score, "ratios", "groups": [{"name", "channels", "scores": one a ratio}]}.
    """

    def score(history: pruning.History) -> float:
        candidate = copy.deepcopy(network).cpu().eval()
        pruning.replay(candidate, history)
        candidate.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return float(task.score(evaluate.outputs(candidate, images, device=device), images.targets)[task.primary])

    rows = []
    with (progress or SilentProgress()).track("sensitivity", 1 + len(cuts.groups) * len(ratios)) as bar:
        whole = score([])
        bar.advance(1, f"{task.primary} {whole:.3f}")
        for group in cuts.groups:
            scores = []
            for ratio in ratios:
                scores.append(score(group.history(max(1, group.size - max(1, int(group.size * ratio))))))
                bar.advance(1, f"{group.name} {scores[-1]:.3f}")
            rows.append({"name": group.name, "channels": group.size, "scores": scores})
    return {"metric": task.primary, "n": len(images), "whole": whole, "ratios": list(ratios), "groups": rows}


def shares(found: dict[str, Any], *, higher_is_better: bool, max_layer_ratio: float) -> Shares:
    """What share of each group to cut, so that all cut groups lose about the same score by themselves.

    A scan gives each group a curve from the share cut to the score lost: no loss at 0, never falling, and the worst of all groups at
    `max_layer_ratio`. At `ratio` each group is cut to the share where its curve reaches that part of the worst loss: 0 cuts nothing, 1 cuts all groups
    by `max_layer_ratio`, and the same loss is taken everywhere between.
    """
    sign = 1 if higher_is_better else -1
    losses = {row["name"]: np.maximum.accumulate([0.0, *(max(0.0, sign * (found["whole"] - s)) for s in row["scores"])]) for row in found["groups"]}
    worst = max(float(curve[-1]) for curve in losses.values()) or 1.0
    measured = [0.0, *(r for r in found["ratios"] if r < max_layer_ratio)]
    places = np.array([*measured, max_layer_ratio])
    curves = {name: np.append(curve[: len(measured)] / worst, 1.0) + UNIFORM_WEIGHT * places for name, curve in losses.items()}

    def share(name: str, ratio: float) -> float:
        curve = curves[name]
        return float(np.interp(ratio * curve[-1], curve, places))

    return share
