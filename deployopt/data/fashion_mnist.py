"""Fashion-MNIST: 60,000 + 10,000 grey images of 28×28 pixels, ten kinds of clothing, in IDX files (gzipped or not).

Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST", https://arxiv.org/abs/1708.07747; IDX as described on the MNIST page of LeCun et al.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from deployopt.data import Dataset
from deployopt.data._download import fetch, md5_file
from deployopt.data._published import Part, PublishedConfig, dataset
from deployopt.errors import ArtifactError, DataNotFound
from deployopt.runtime.hashing import sha256_json
from deployopt.runtime.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
TORCHVISION = Path("data/FashionMNIST/raw")
MIRROR = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
MD5 = {  # of the gzipped files, as in torchvision.datasets.FashionMNIST
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}
UBYTE = 0x08  # IDX type code of unsigned bytes


class Config(PublishedConfig):
    """Fashion-MNIST from local IDX files."""

    folder: str | None = None
    """Folder of the four IDX files, .gz or plain. None looks where Debian's package dataset-fashion-mnist puts them, then in ./data/FashionMNIST/raw."""
    download: bool = False
    """Fetch missing files into the folder (./data/FashionMNIST/raw when none is given)."""
    mean: list[float] = Field(default=[0.286] * 3, min_length=3, max_length=3)
    """Mean of 0–1 values per channel, subtracted inside the network."""
    std: list[float] = Field(default=[0.353] * 3, min_length=3, max_length=3)
    """Standard deviation of 0–1 values per channel, divided by inside the network."""


def fingerprint(config: Config) -> str:
    """Of the files' contents; of the published checksums for those still to be downloaded."""
    files = _found(_download_folder(config)) if _to_download(config) else _files(config)
    contents = {**MD5, **{name: md5_file(path) for name, path in files.items()}}
    return sha256_json({"files": contents, **config.model_dump(exclude={"folder", "download"})})


def load(config: Config, progress: Progress | None = None) -> Dataset:
    if _to_download(config):
        _download(_download_folder(config), progress)
    files = _files(config)
    return dataset(_pair(files, "train"), _pair(files, "t10k"), CLASSES, config)


def _pair(files: dict[str, Path], part: str) -> Part:
    """Images uint8 [N, 28, 28, 1] and targets int64 [N] of one part."""
    import numpy as np

    images = read_idx(files[f"{part}-images-idx3-ubyte"], dimensions=3)
    labels = read_idx(files[f"{part}-labels-idx1-ubyte"], dimensions=1)
    if len(images) != len(labels):
        raise ArtifactError(f"Fashion-MNIST {part}: {len(images)} images but {len(labels)} labels", "replace the files by one complete copy")
    if labels.size and labels.max() >= len(CLASSES):
        raise ArtifactError(f"Fashion-MNIST {part}: label {labels.max()} found, wanted 0–9", "replace the label file")
    return images[..., None], labels.astype(np.int64)


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, gzipped if its name ends in .gz.

    Format: two zero bytes, type code, number of dimensions, one big-endian uint32 a dimension, then the values in C order.

    Raises:
        ArtifactError: wrong magic, truncated, or too long; names the file.
    """
    import numpy as np

    remedy = "replace it by a complete copy of the file"
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise ArtifactError(f"{path.name}: broken gzip ({exc})", remedy) from exc
    wanted = bytes([0, 0, UBYTE, dimensions])
    if data[:4] != wanted:
        raise ArtifactError(f"{path.name}: wanted IDX magic {wanted.hex()} (unsigned bytes, {dimensions} dimensions), found '{data[:4].hex()}'", remedy)
    start = 4 + 4 * dimensions
    if len(data) < start:
        raise ArtifactError(f"{path.name}: truncated inside its header ({len(data)} bytes)", remedy)
    shape = tuple(int.from_bytes(data[4 + 4 * d : 8 + 4 * d], "big") for d in range(dimensions))
    size = math.prod(shape)
    if len(data) - start != size:
        raise ArtifactError(f"{path.name}: its header announces {shape} = {size} bytes, {len(data) - start} follow", remedy)
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _folders(config: Config) -> list[Path]:
    return [Path(config.folder)] if config.folder is not None else [DEBIAN, TORCHVISION]


def _found(folder: Path) -> dict[str, Path]:
    candidates = {name: (folder / name, folder / f"{name}.gz") for name in MD5}
    return {name: next(p for p in paths if p.is_file()) for name, paths in candidates.items() if any(p.is_file() for p in paths)}


def _files(config: Config) -> dict[str, Path]:
    looked: list[str] = []
    for folder in _folders(config):
        found = _found(folder)
        if len(found) == len(MD5):
            return found
        missing = sorted(set(MD5) - set(found))
        looked.append(f"{folder} (lacks {', '.join(missing) if found else 'all four files'})")
    raise DataNotFound(
        f"Fashion-MNIST's IDX files were not found in {' nor in '.join(looked)}", "apt-get install dataset-fashion-mnist, or set data.download: true"
    )


def _to_download(config: Config) -> bool:
    return config.download and not any(len(_found(folder)) == len(MD5) for folder in _folders(config))


def _download_folder(config: Config) -> Path:
    return _folders(config)[-1]


def _download(folder: Path, progress: Progress | None) -> None:
    for name in sorted(set(MD5) - set(_found(folder))):
        fetch(f"{MIRROR}{name}.gz", folder / f"{name}.gz", MD5[name], progress)
