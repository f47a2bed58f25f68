"""A module's outputs on a split, and the images that calibrate it. Scoring is the task's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deployopt.data import ImageSet
from deployopt.nn import distributed
from deployopt.runtime.preprocessing import to_feed


@torch.inference_mode()
def outputs(
    module: nn.Module,
    image_set: ImageSet,
    batch_size: int = 256,
    device: str = "cpu",
    on_batch: Callable[[int], None] | None = None,
    count: int | None = None,
) -> NDArray[np.float32]:
    """Outputs float32 [N, K] in the split's order. `module` must already be in evaluation mode.

    Processes that train together compute a share each; all of them have to call this, and all get all outputs.

    Args:
        on_batch: called after each batch with its number of images, and at the end with the number that other processes computed.
        count: how many, from the first; None: all.
    """
    total = len(image_set) if count is None else min(count, len(image_set))
    parts, own = [], distributed.share(total)
    for start in range(own.start, own.stop, batch_size):
        images = image_set.images(range(start, min(start + batch_size, own.stop)))
        parts.append(module(torch.from_numpy(to_feed(images)).to(device, memory_format=torch.channels_last)).float().cpu().numpy())
        if on_batch is not None:
            on_batch(len(images))
    rows = distributed.gathered(np.concatenate(parts), total)
    others = total - (own.stop - own.start)
    if on_batch is not None and others:
        on_batch(others)
    return rows


def broken(outputs: NDArray[np.float32]) -> int:
    """How many images have NaN or infinite outputs [N, K]."""
    return int((~np.isfinite(outputs)).any(axis=1).sum())


def calibration_batches(images: ImageSet, count: int, seed: int, device: str = "cpu", batch_size: int = 64) -> Iterator[Tensor]:
    """At most `count` images drawn by `seed`, after evaluation preprocessing: float32 [n, C, H, W] in 0–1."""
    random = np.random.Generator(np.random.PCG64([seed, *b"calibration"]))
    chosen = random.permutation(len(images))[:count]
    for start in range(0, len(chosen), batch_size):
        yield torch.from_numpy(to_feed(images.images(chosen[start : start + batch_size]))).to(device)
