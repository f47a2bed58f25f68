"""Your own images: `folder/train/CLASS/*.jpg`, `folder/val/CLASS/*.jpg` and, if there is one, `folder/test/CLASS/*.jpg`.

Classes are the sorted names of train's subfolders. Without `test`, `val` is the test split (scored, never chosen by) and the
validation split is carved from `train`; so no choice ever sees the images that the report is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from deployopt.data import DataConfig, Dataset
from deployopt.data._arrays import stratified_split
from deployopt.errors import ArtifactError, DataNotFound
from deployopt.runtime import preprocessing as pre
from deployopt.runtime.hashing import sha256_json
from deployopt.runtime.preprocessing import Preprocessing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})


class Config(DataConfig):
    """Images in class folders. Mean and std default to ImageNet's, as torchvision's weights want them."""

    folder: str
    """Holds train/, val/ and optionally test/, each with one subfolder a class."""
    image_size: int = Field(default=224, ge=8, le=2048)
    """Height and width of the network's input."""
    resize: int | None = Field(default=256, ge=8, le=4096)
    """Shorter side before the centre crop; null resizes straight to image_size × image_size, without keeping the aspect."""
    channels: int = Field(default=3, ge=1, le=3)
    """3 (RGB) or 1 (grey)."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of every class of train that is the validation split when there is no test/ folder."""
    split_seed: int = Field(default=0, ge=0)
    """Seed of that split."""
    workers: int = Field(default=8, ge=1, le=64)
    """Threads that decode images."""
    mean: list[float] = Field(default=[0.485, 0.456, 0.406], min_length=1, max_length=3)
    """Mean of 0–1 values per channel, subtracted inside the network."""
    std: list[float] = Field(default=[0.229, 0.224, 0.225], min_length=1, max_length=3)
    """Standard deviation of 0–1 values per channel, divided by inside the network."""

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.channels == 2 or not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"channels is 1 or 3, and mean and std need as many values; found {self.channels}, {len(self.mean)} and {len(self.std)}")
        if self.resize is not None and self.resize < self.image_size:
            raise ValueError(f"resize ({self.resize}) must not be smaller than image_size ({self.image_size})")
        return self


class FolderSet:
    """An `ImageSet` over files that are decoded when they are asked for."""

    def __init__(self, paths: Sequence[Path], targets: NDArray[np.int64], preprocessing: Preprocessing, workers: int) -> None:
        self.targets = targets
        self._paths = paths
        self._preprocessing = preprocessing
        self._workers = workers

    def __len__(self) -> int:
        return len(self._paths)

    def images(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        import numpy as np

        with ThreadPoolExecutor(self._workers) as pool:  # Pillow releases the GIL while it decodes and resizes
            return np.stack(list(pool.map(lambda index: pre.apply(self.raw(int(index)), self._preprocessing), indices)))

    def raw(self, index: int) -> NDArray[np.uint8]:
        return pre.decode(self._paths[index], self._preprocessing.channels)


def fingerprint(config: Config) -> str:
    """Of names, sizes and times of change, not of contents: a plan asks for it, and may not take as long as reading every image."""
    root = _root(config)
    files = sorted(p for split in ("train", "val", "test") for p in (root / split).rglob("*") if p.suffix.lower() in SUFFIXES)
    stats = [[p.relative_to(root).as_posix(), s.st_size, s.st_mtime_ns] for p in files for s in [p.stat()]]
    return sha256_json({"files": stats, **config.model_dump(exclude={"folder", "workers"})})


def load(config: Config) -> Dataset:
    root = _root(config)
    classes = tuple(sorted(p.name for p in (root / "train").iterdir() if p.is_dir()))
    if len(classes) < 2:
        raise DataNotFound(f"{root / 'train'} has {len(classes)} class folders, wanted at least two", "put each class's images in train/CLASS/")
    preprocessing = Preprocessing(config.image_size, config.channels, config.resize, tuple(config.mean), tuple(config.std))

    def image_set(paths: Sequence[Path], targets: NDArray[np.int64]) -> FolderSet:
        return FolderSet(paths, targets, preprocessing, config.workers)

    train, train_targets = _split(root / "train", classes)
    val, val_targets = _split(root / "val", classes)
    if (root / "test").is_dir():
        splits = image_set(train, train_targets), image_set(val, val_targets), image_set(*_split(root / "test", classes))
    else:
        kept, held = stratified_split(train_targets, config.validation_fraction, config.split_seed)
        carved = [image_set([train[i] for i in rows], train_targets[rows]) for rows in (kept, held)]
        splits = carved[0], carved[1], image_set(val, val_targets)
    return Dataset(*splits, classes, preprocessing)


def _root(config: Config) -> Path:
    root = Path(config.folder)
    missing = [name for name in ("train", "val") if not (root / name).is_dir()]
    if missing:
        raise DataNotFound(
            f"{root} lacks the folder{'s' if len(missing) > 1 else ''} {' and '.join(missing)}", "set data.folder to one that holds train/CLASS/ and val/CLASS/"
        )
    return root


def _split(folder: Path, classes: tuple[str, ...]) -> tuple[list[Path], NDArray[np.int64]]:
    """Image paths of one split in class and name order, with their class indices."""
    import numpy as np

    strangers = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name not in classes)
    if strangers:
        raise ArtifactError(f"{folder} has class folders that train has not: {', '.join(strangers)}", "rename or remove them")
    paths: list[Path] = []
    targets: list[int] = []
    for index, name in enumerate(classes):
        members = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        if not members and folder.name == "train":
            raise DataNotFound(f"{folder / name} holds no image ({', '.join(sorted(SUFFIXES))})", "add images or remove the empty class")
        paths += members
        targets += [index] * len(members)
    if not paths:
        raise DataNotFound(f"{folder} holds no image ({', '.join(sorted(SUFFIXES))})", "put each class's images in a subfolder named as in train/")
    return paths, np.array(targets, np.int64)
