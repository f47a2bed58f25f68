"""What is timed where no data are given: noise that looks natural enough for every runtime's kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deployopt.runtime.session import TensorSpec

SYNTHETIC = "synthetic 1/f noise, seeded (no data were given)"


def images_for(inputs: Sequence[TensorSpec], batch: int, seed: int) -> NDArray[np.uint8]:
    """Noise of the size that a model takes; free axes become 224 and 3. A model that takes no image gets one anyway and refuses it with the reason."""
    sizes = [size if isinstance(size, int) and size > 0 else None for size in inputs[0].shape[1:]] if inputs else []
    channels, height, width = sizes if len(sizes) == 3 else (None, None, None)
    return natural_noise(8 * batch, height or 224, width or 224, channels or 3, seed)


def natural_noise(n: int, height: int, width: int, channels: int, seed: int) -> NDArray[np.uint8]:
    """Images uint8 [n, H, W, C] whose amplitude spectrum falls as 1/f, as natural images' does (Field 1987), random in phase."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf  # no mean: it is set below
    noise = np.empty((n, height, width, channels), np.uint8)
    for i in range(n):
        white = np.fft.rfft2(rng.standard_normal((channels, height, width)))
        image = np.fft.irfft2(white / frequency, s=(height, width))
        noise[i] = np.clip(127.5 + 50 * image / (image.std() or 1.0), 0, 255).transpose(1, 2, 0)
    return noise
