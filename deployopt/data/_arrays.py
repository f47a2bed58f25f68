"""Splits held in memory, for data sets of small images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from deployopt.runtime import preprocessing as pre
from deployopt.runtime.preprocessing import Preprocessing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KEPT_BYTES = 1 << 30  # a split whose preprocessed images need more is preprocessed on every access


class ArraySet:
    """An `ImageSet` over an array.

    Args:
        stored: uint8 [N, h, w, C] as in the data set's files.
        targets: int64 [N], or float32 [N, K] for regression.
    """

    def __init__(self, stored: NDArray[np.uint8], targets: NDArray[Any], preprocessing: Preprocessing) -> None:
        if len(stored) != len(targets):
            raise ValueError(f"{len(stored)} images but {len(targets)} targets")
        self.targets = targets
        self._stored = stored
        self._preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self._stored)

    def images(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        import numpy as np

        rows = np.asarray(indices, dtype=np.int64)
        if len(self) * self._preprocessing.image_size**2 * self._stored.shape[-1] <= KEPT_BYTES:
            return pre.with_channels(self._preprocessed[rows], self._preprocessing.channels)
        return _preprocess(self._stored[rows], self._preprocessing)

    def raw(self, index: int) -> NDArray[np.uint8]:
        return pre.with_channels(self._stored[index], self._preprocessing.channels)

    @cached_property
    def _preprocessed(self) -> NDArray[np.uint8]:
        """uint8 [N, H, W, stored C]: grey images stay one channel, a third of the memory."""
        return _preprocess(self._stored, self._preprocessing._replace(channels=self._stored.shape[-1]))


def _preprocess(images: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    import numpy as np

    size = preprocessing.image_size
    result = np.empty((len(images), size, size, preprocessing.channels), np.uint8)
    for row, image in enumerate(images):
        result[row] = pre.apply(image, preprocessing)
    return result


def stratified_split(targets: NDArray[np.integer[Any]], fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices (kept, held out), both ascending; `fraction` of every class is held out, rounded, at least one image.

    The same targets, fraction and seed give the same split on every machine (NumPy's PCG64 stream is stable).
    """
    import numpy as np

    random = np.random.Generator(np.random.PCG64(seed))
    held: list[NDArray[np.int64]] = []
    for label in np.unique(targets):
        members = random.permutation(np.flatnonzero(targets == label))
        held.append(members[: max(1, round(len(members) * fraction))])
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(targets)), out), out


def stratified_subset(targets: NDArray[np.integer[Any]], size: int, seed: int) -> NDArray[np.int64]:
    """About `size` indices, ascending, with every class represented by its share; all of them if there are not more."""
    import numpy as np

    if size >= len(targets):
        return np.arange(len(targets))
    return stratified_split(targets, size / len(targets), seed)[1]
