"""CIFAR-10: 50,000 + 10,000 RGB images of 32×32 pixels, read from the *binary version* (the Python version is pickles, which are never loaded).

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; https://www.cs.toronto.edu/~kriz/cifar.html says the layout:
a record is one label byte, then 1,024 red, 1,024 green and 1,024 blue bytes, each plane row by row.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from deployopt.data import Dataset
from deployopt.data._download import fetch, md5_file
from deployopt.data._published import PublishedConfig, dataset
from deployopt.errors import ArtifactError, DataNotFound
from deployopt.runtime.hashing import sha256_json
from deployopt.runtime.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DEFAULT_FOLDER = Path("data/cifar-10-batches-bin")
ARCHIVE = "cifar-10-binary.tar.gz"
URL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # published beside the archive
BATCH_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
RECORD_BYTES = 1 + 3 * 32 * 32


class Config(PublishedConfig):
    """CIFAR-10 from its binary files."""

    folder: str | None = None
    """Folder of data_batch_1.bin … test_batch.bin, or of cifar-10-binary.tar.gz as published; None is ./data/cifar-10-batches-bin."""
    download: bool = False
    """Fetch the archive (about 170 MB) into the folder if neither is there."""
    mean: list[float] = Field(default=[0.4914, 0.4822, 0.4465], min_length=3, max_length=3)
    """Mean of 0–1 values per channel, subtracted inside the network."""
    std: list[float] = Field(default=[0.2470, 0.2435, 0.2616], min_length=3, max_length=3)
    """Standard deviation of 0–1 values per channel, divided by inside the network."""


def fingerprint(config: Config) -> str:
    """Of the files' contents; of the published archive's checksum while it is still to be downloaded."""
    archive, files = _archive(config), _files(config)
    if files:
        contents = {path.name: md5_file(path) for path in files}
    elif archive.is_file() or config.download:
        contents = {ARCHIVE: md5_file(archive) if archive.is_file() else MD5}
    else:
        raise _not_found(config)
    return sha256_json({"files": contents, **config.model_dump(exclude={"folder", "download"})})


def load(config: Config, progress: Progress | None = None) -> Dataset:
    import numpy as np

    *batches, tested = [read_batch(name, data) for name, data in _contents(config, progress)]
    train = np.concatenate([b[0] for b in batches]), np.concatenate([b[1] for b in batches])
    return dataset(train, tested, CLASSES, config)


def read_batch(name: str, data: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 [N, 32, 32, 3] and targets int64 [N] of one binary batch.

    Raises:
        ArtifactError: empty, truncated, or a label above 9; names the file.
    """
    import numpy as np

    remedy = "delete it and set data.download: true, or unpack the binary archive again"
    if not data or len(data) % RECORD_BYTES:
        raise ArtifactError(f"{name}: {len(data)} bytes are not a whole number of {RECORD_BYTES}-byte records", remedy)
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD_BYTES)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= len(CLASSES):
        raise ArtifactError(f"{name}: label {labels.max()} in record {int(labels.argmax())}, wanted 0–9", remedy)
    planes = records[:, 1:].reshape(-1, 3, 32, 32)  # [N, C, H, W]
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels


def _contents(config: Config, progress: Progress | None) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the five training files and the test file, in that order, unpacked or straight from the archive."""
    archive, files = _archive(config), _files(config)
    if files:
        yield from ((path.name, path.read_bytes()) for path in files)
        return
    if not archive.is_file():
        if not config.download:
            raise _not_found(config)
        fetch(URL, archive, MD5, progress)
    try:
        with tarfile.open(archive) as tar:  # one pass: seeking back in a gzipped archive unpacks it again
            members = {Path(member.name).name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError, OSError, zlib.error) as exc:
        raise ArtifactError(f"{archive.name} cannot be unpacked: {exc}", "delete it and set data.download: true") from exc
    if lacking := [name for name in BATCH_FILES if name not in members]:
        raise ArtifactError(f"{archive.name} holds no {', '.join(lacking)}", "replace it by the published binary version")
    yield from ((name, members[name]) for name in BATCH_FILES)


def _folder(config: Config) -> Path:
    return DEFAULT_FOLDER if config.folder is None else Path(config.folder)


def _archive(config: Config) -> Path:
    return _folder(config) / ARCHIVE


def _files(config: Config) -> list[Path]:
    """The unpacked files, or none if one is missing."""
    paths = [_folder(config) / name for name in BATCH_FILES]
    return paths if all(p.is_file() for p in paths) else []


def _not_found(config: Config) -> DataNotFound:
    missing = [name for name in BATCH_FILES if not (_folder(config) / name).is_file()]
    return DataNotFound(
        f"CIFAR-10's binary files were not found in {_folder(config)} (missing: {ARCHIVE}, or {', '.join(missing)})",
        "set data.download: true, or put cifar-10-binary.tar.gz there, or set data.folder",
    )
