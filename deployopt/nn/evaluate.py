"""A module's outputs on a split. Scoring is the task's."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deployopt.data import ImageSet
from deployopt.runtime.preprocessing import to_feed


@torch.inference_mode()
def outputs(module: nn.Module, image_set: ImageSet, batch_size: int = 256, device: str = "cpu") -> NDArray[np.float32]:
    """Outputs float32 [N, K] in the split's order. `module` must already be in evaluation mode."""
    parts = []
    for start in range(0, len(image_set), batch_size):
        images = image_set.images(range(start, min(start + batch_size, len(image_set))))
        parts.append(module(torch.from_numpy(to_feed(images)).to(device, memory_format=torch.channels_last)).float().cpu().numpy())
    return np.concatenate(parts)
