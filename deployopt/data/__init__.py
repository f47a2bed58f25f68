"""One file a data source. This page is what a data source is. Torch-free; uint8 images and targets."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from deployopt.config import Strict
from deployopt.data._arrays import ArraySet, stratified_split
from deployopt.runtime.preprocessing import Preprocessing
from deployopt.runtime.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["ArraySet", "DataConfig", "DataSource", "Dataset", "ImageSet", "Leading", "load", "stratified_split"]


class DataConfig(Strict):
    """Base of every data source's `Config`: frozen, unknown keys and NaN refused."""

    NOT_IN_KEY: ClassVar[frozenset[str]] = frozenset({"folder", "download", "workers"})
    """Options that say where the data are and how they are read, not what they are."""


class ImageSet(Protocol):
    """One split.

    Attributes:
        targets: class indices int64 [N] for classification, float32 [N, K] for regression.
    """

    targets: NDArray[Any]

    def __len__(self) -> int: ...

    def images(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        """Images after evaluation preprocessing (decode, resize, crop): uint8 [n, H, W, C]."""

    def raw(self, index: int) -> NDArray[np.uint8]:
        """One image as stored, for training augmentation: uint8 [h, w, C]."""


class Leading:
    """The first `count` images of a split, or all if it has fewer."""

    def __init__(self, images: ImageSet, count: int) -> None:
        self._images, self._count = images, min(count, len(images))
        self.targets = images.targets[: self._count]

    def __len__(self) -> int:
        return self._count

    def images(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        return self._images.images(indices)

    def raw(self, index: int) -> NDArray[np.uint8]:
        return self._images.raw(index)


@dataclass(frozen=True)
class Dataset:
    """Three splits that share no image.

    Attributes:
        train: for gradients. validation: for every choice. test: scored once per finished artifact.
        classes: names by index; empty for regression.
        preprocessing: image size, resize, crop, and the mean and std (of 0–1 values) that go into the exported graph.
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    preprocessing: Preprocessing


class DataSource(Protocol):
    """The attributes of a data source module.

    Attributes:
        Config: its options (the recipe's `data` section without `name`).
    """

    Config: type[DataConfig]

    def fingerprint(self, config: Any) -> str:
        """Changes whenever the data do. Cheap: no decoding.

        Raises:
            DataNotFound: says where it looked and how to get the files.
        """

    def load(self, config: Any) -> Dataset:
        """Open the data. Raises DataNotFound, MissingDependency. One that also takes `progress` is given it (see `load`)."""


def load(source: DataSource, config: Any, progress: Progress) -> Dataset:
    """`source.load(config)`, with `progress` if it takes it: a source that downloads tells how far it is."""
    arguments = {"progress": progress} if "progress" in inspect.signature(source.load).parameters else {}
    return source.load(config, **arguments)
