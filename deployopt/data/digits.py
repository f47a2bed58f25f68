"""scikit-learn's handwritten digits: 1,797 grey images of 8×8 pixels, inside the package, nothing to download.

Source: UCI "Optical Recognition of Handwritten Digits" (test part), https://doi.org/10.24432/C50P49.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from pydantic import Field

from deployopt.data import DataConfig, Dataset
from deployopt.data._arrays import ArraySet, stratified_split
from deployopt.errors import MissingDependency
from deployopt.runtime.hashing import sha256_json
from deployopt.runtime.preprocessing import Preprocessing


class Config(DataConfig):
    """Handwritten digits, enlarged bilinearly."""

    image_size: int = Field(default=32, ge=8, le=512)
    """Height and width that the 8×8 images are enlarged to."""
    test_fraction: float = Field(default=0.3, gt=0, lt=1)
    """Share of every class held out for the test split."""
    validation_fraction: float = Field(default=0.15, gt=0, lt=1)
    """Share of every class of the rest that is the validation split."""
    split_seed: int = Field(default=0, ge=0)
    """Seed of the splits; independent of the recipe's seed, so runs with several seeds share a test split."""
    mean: list[float] = Field(default=[0.306] * 3, min_length=3, max_length=3)
    """Mean of 0–1 values per channel, subtracted inside the network."""
    std: list[float] = Field(default=[0.324] * 3, min_length=3, max_length=3)
    """Standard deviation of 0–1 values per channel, divided by inside the network."""


def fingerprint(config: Config) -> str:
    try:
        release = version("scikit-learn")
    except PackageNotFoundError as exc:
        raise MissingDependency("sklearn", "train", "to read the digits data set") from exc
    return sha256_json({"digits": release, **config.model_dump()})


def load(config: Config) -> Dataset:
    import numpy as np

    try:
        from sklearn.datasets import load_digits
    except ImportError as exc:
        raise MissingDependency("sklearn", "train", "to read the digits data set") from exc
    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # [1797, 8, 8, 1]; stored values are 0–16
    targets = bunch.target.astype(np.int64)
    preprocessing = Preprocessing(config.image_size, 3, None, tuple(config.mean), tuple(config.std))
    rest, test = stratified_split(targets, config.test_fraction, config.split_seed)
    kept, held = stratified_split(targets[rest], config.validation_fraction, config.split_seed)
    train, validation, tested = (ArraySet(images[rows], targets[rows], preprocessing) for rows in (rest[kept], rest[held], test))
    return Dataset(train, validation, tested, tuple(str(d) for d in range(10)), preprocessing)
