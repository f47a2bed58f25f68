"""Small real data and one thread for every test that computes with torch; makes this folder's helpers importable."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deployopt.data import Dataset
from deployopt.data._arrays import ArraySet
from deployopt.runtime.preprocessing import Preprocessing

HELPERS = str(Path(__file__).parent)
if HELPERS not in sys.path:
    sys.path.append(HELPERS)

SIZE = 8
PREPROCESSING = Preprocessing(SIZE, 3, None, (0.5,) * 3, (0.25,) * 3)
COLOURS = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220]])


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def coloured(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images uint8 [count, 12, 12, 3] of one colour each, and which colour: int64 [count]."""
    random = np.random.default_rng(seed)
    targets = np.arange(count) % len(COLOURS)
    noise = random.integers(-40, 40, (count, 12, 12, 3))
    return (COLOURS[targets][:, None, None, :] + noise).clip(0, 255).astype(np.uint8), targets


@pytest.fixture(scope="session")
def colours() -> Dataset:
    """Classification of three colours: 96 + 24 + 24 images."""
    splits = [ArraySet(*coloured(count, seed), PREPROCESSING) for seed, count in enumerate((96, 24, 24))]
    return Dataset(*splits, ("red", "green", "blue"), PREPROCESSING)


@pytest.fixture(scope="session")
def shades() -> Dataset:
    """Regression of an image's mean red and green, in 0–1."""
    splits = []
    for seed, count in enumerate((96, 24, 24)):
        images, _ = coloured(count, seed)
        splits.append(ArraySet(images, (images.mean((1, 2))[:, :2] / 255).astype(np.float32), PREPROCESSING))
    return Dataset(*splits, (), PREPROCESSING)
