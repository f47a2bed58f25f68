"""Data sets of small images that are published as one training and one test part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from deployopt.data import DataConfig, Dataset
from deployopt.data._arrays import ArraySet, stratified_split, stratified_subset
from deployopt.runtime.preprocessing import Preprocessing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Part = tuple["NDArray[np.uint8]", "NDArray[np.int64]"]  # images [N, h, w, C], targets [N]


class PublishedConfig(DataConfig):
    """Options that these data sets share; each says which files it wants, and its mean and standard deviation."""

    folder: str | None = None
    """Folder of the files."""
    download: bool = False
    """Fetch missing files."""
    image_size: int = Field(default=32, ge=8, le=512)
    """Height and width that the stored images are resized to."""
    limit: int | None = Field(default=None, ge=20)
    """Use about this many training images, every class by its share; None uses all. The test split is always whole."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of every class of the training images that is the validation split."""
    split_seed: int = Field(default=0, ge=0)
    """Seed of the subset and of the validation split."""
    mean: list[float] = Field(min_length=3, max_length=3)
    """Mean of 0–1 values per channel, subtracted inside the network."""
    std: list[float] = Field(min_length=3, max_length=3)
    """Standard deviation of 0–1 values per channel, divided by inside the network."""


def dataset(train: Part, test: Part, classes: tuple[str, ...], config: PublishedConfig) -> Dataset:
    """The three splits: validation is carved from the training part, the test part is whole."""
    preprocessing = Preprocessing(config.image_size, 3, None, tuple(config.mean), tuple(config.std))
    images, targets = train
    if config.limit is not None:
        chosen = stratified_subset(targets, config.limit, config.split_seed)
        images, targets = images[chosen], targets[chosen]
    splits = stratified_split(targets, config.validation_fraction, config.split_seed)
    kept, held = (ArraySet(images[rows], targets[rows], preprocessing) for rows in splits)
    return Dataset(kept, held, ArraySet(*test, preprocessing), classes, preprocessing)
