"""CIFAR-10: 50,000 + 10,000 RGB images of 32×32 pixels, read from the *binary version* (the Python version is pickles, which are never loaded).

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; https://www.cs.toronto.edu/~kriz/cifar.html says the layout:
a record is one label byte, then 1,024 red, 1,024 green and 1,024 blue bytes, each plane row by row.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from deployopt.data import DataConfig, Dataset
from deployopt.data._arrays import ArraySet, stratified_split, stratified_subset
from deployopt.data._download import fetch
from deployopt.errors import ArtifactError, DataNotFound
from deployopt.runtime.files import atomic_write
from deployopt.runtime.hashing import sha256_json
from deployopt.runtime.preprocessing import Preprocessing

extra = None
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DEFAULT_FOLDER = Path("data/cifar-10-batches-bin")
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # published beside the archive
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILE = "test_batch.bin"
RECORD_BYTES = 1 + 3 * 32 * 32


class Config(DataConfig):
    """CIFAR-10 from its binary files."""

    folder: str | None = None
    """Folder of data_batch_1.bin … test_batch.bin; None is ./data/cifar-10-batches-bin."""
    download: bool = False
    """Fetch and unpack the archive (about 170 MB) if the files are missing."""
    image_size: int = Field(default=32, ge=8, le=512)
    """Height and width that the 32×32 images are resized to."""
    limit: int | None = Field(default=None, ge=20)
    """Use about this many training images, every class by its share; None uses all. The test split is always whole."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of every class of the training images that is the validation split."""
    split_seed: int = Field(default=0, ge=0)
    """Seed of the subset and of the validation split."""
    mean: list[float] = Field(default=[0.4914, 0.4822, 0.4465], min_length=3, max_length=3)
    """Mean of 0–1 values per channel, subtracted inside the network."""
    std: list[float] = Field(default=[0.2470, 0.2435, 0.2616], min_length=3, max_length=3)
    """Standard deviation of 0–1 values per channel, divided by inside the network."""


def fingerprint(config: Config) -> str:
    stats = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in _files(config)}
    return sha256_json({"files": stats, **config.model_dump(exclude={"folder", "download"})})


def load(config: Config) -> Dataset:
    *train_files, test_file = _files(config)
    batches = [read_batch(path) for path in train_files]
    images, targets = np.concatenate([b[0] for b in batches]), np.concatenate([b[1] for b in batches])
    preprocessing = Preprocessing(config.image_size, 3, None, tuple(config.mean), tuple(config.std))
    if config.limit is not None:
        chosen = stratified_subset(targets, config.limit, config.split_seed)
        images, targets = images[chosen], targets[chosen]
    kept, held = stratified_split(targets, config.validation_fraction, config.split_seed)
    train, validation = (ArraySet(images[rows], targets[rows], preprocessing) for rows in (kept, held))
    return Dataset(train, validation, ArraySet(*read_batch(test_file), preprocessing), CLASSES, preprocessing)


def read_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 [N, 32, 32, 3] and targets int64 [N] of one binary batch.

    Raises:
        ArtifactError: empty, truncated, or a label above 9; names the file.
    """
    data = np.fromfile(path, np.uint8)
    remedy = "delete it and set data.download: true, or unpack the binary archive again"
    if data.size == 0 or data.size % RECORD_BYTES:
        raise ArtifactError(f"{path.name}: {data.size} bytes are not a whole number of {RECORD_BYTES}-byte records", remedy)
    records = data.reshape(-1, RECORD_BYTES)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= len(CLASSES):
        raise ArtifactError(f"{path.name}: label {labels.max()} in record {int(labels.argmax())}, wanted 0–9", remedy)
    planes = records[:, 1:].reshape(-1, 3, 32, 32)  # [N, C, H, W]
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels


def _files(config: Config) -> list[Path]:
    """The five training files and the test file, in that order."""
    folder = DEFAULT_FOLDER if config.folder is None else Path(config.folder)
    paths = [folder / name for name in (*TRAIN_FILES, TEST_FILE)]
    if config.download and not all(p.is_file() for p in paths):
        _download(folder)
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise DataNotFound(
            f"CIFAR-10's binary files were not found in {folder} (missing: {', '.join(missing)})",
            "set data.download: true, or unpack cifar-10-binary.tar.gz there and set data.folder",
        )
    return paths


def _download(folder: Path) -> None:
    archive = folder.parent / URL.rsplit("/", 1)[1]
    fetch(URL, archive, MD5)
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        for name in (*TRAIN_FILES, TEST_FILE):
            member = tar.extractfile(f"cifar-10-batches-bin/{name}")
            if member is None:
                raise ArtifactError(f"{archive.name} holds no regular file {name}")
            atomic_write(folder / name, member.read())
    archive.unlink()
