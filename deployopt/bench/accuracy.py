"""Accuracy of the exact bytes that are deployed: outputs over a whole split, scored, and compared with other models' outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deployopt.data import ImageSet
from deployopt.errors import StageFailed
from deployopt.tasks import Task

Infer = Callable[[NDArray[np.uint8]], NDArray[Any]]
AGREEMENT = 0.995  # share of images on which an artifact should answer as its own torch network does: what both compute differs by rounding only
AGREEMENT_IMAGES = 200  # of fewer, a single other answer is below that


def outputs_of(infer: Infer, image_set: ImageSet, batch: int = 32) -> NDArray[np.float32]:
    """Outputs [N, K] over a whole split.

    Every call has exactly `batch` images, the last one padded with its last image: an engine may run no other batch size.

    Args:
        infer: images uint8 [batch, H, W, C] → outputs [batch, K].
    """
    parts = []
    for start in range(0, len(image_set), batch):
        indices = np.arange(start, start + batch)
        images = image_set.images(np.minimum(indices, len(image_set) - 1))
        parts.append(infer(images)[: len(image_set) - start])
    return np.concatenate(parts).astype(np.float32, copy=False)


def finite(outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Outputs [N, K] as they are.

    Raises:
        StageFailed: some are not finite; says of how many images.
    """
    good = np.isfinite(outputs).reshape(len(outputs), -1).all(axis=1)
    if not good.all():
        raise StageFailed(
            f"outputs of {int((~good).sum())} of {len(outputs)} images are NaN or infinite",
            "an FP16 model that overflows needs its range checked, or bf16 or fp32",
        )
    return outputs


def score(
    infer: Infer, image_set: ImageSet, task: Task, references: Mapping[str, NDArray[Any]] | None = None, batch: int = 32
) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """Score a model over a whole split and compare its outputs with other models'.

    Args:
        references: outputs [N, K] on the same images, by the prefix of the keys they give: {"": float parent} gives "agreement" and
            "max_abs_diff", {"torch_": own torch model} gives "torch_agreement" and "torch_max_abs_diff".

    Returns:
        {"primary": name, its metrics, "n", agreements}, and the outputs.

    Raises:
        StageFailed: outputs that are not finite.
    """
    outputs = finite(outputs_of(infer, image_set, batch))
    result: dict[str, Any] = {"primary": task.primary, **task.score(outputs, image_set.targets)}
    for prefix, reference in (references or {}).items():
        result.update({f"{prefix}{name}": value for name, value in task.agree(outputs, reference).items()})
    return result, outputs


def disagreement(accuracy: Mapping[str, Any], task: Task, network: str) -> str | None:
    """What a reader should know of an artifact that answers otherwise than its own torch network on too many images.

    Args:
        accuracy: as `score` returns it, compared with that network as "torch_".
        network: names it: "torch network", "quantised torch network".

    Returns:
        None where `AGREEMENT` is met, where the images are fewer than `AGREEMENT_IMAGES`, or where outputs are no answers, as in regression.
    """
    share = accuracy.get("torch_agreement")
    if share is None or task.loss != "cross_entropy" or accuracy["n"] < AGREEMENT_IMAGES or share >= AGREEMENT:
        return None
    shown = math.floor(1000 * share + 1e-6) / 10  # down: 99.49 % is not 99.5 %
    return f"{shown:.1f} % of its answers are those of the {network}; wanted {100 * AGREEMENT:g} %"
