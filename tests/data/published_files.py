"""Small files in the formats of published data sets, made of noise with a class in it."""

import gzip
from pathlib import Path

import numpy as np

from deployopt.data import cifar10


def idx(array: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def fashion_mnist(train: int, test: int) -> dict[str, bytes]:
    """Contents of the four IDX files, by name: noise; the classes take turns."""
    random = np.random.default_rng(0)
    files = {}
    for part, count in {"train": train, "t10k": test}.items():
        files[f"{part}-images-idx3-ubyte"] = idx(random.integers(0, 256, (count, 28, 28), np.uint8))
        files[f"{part}-labels-idx1-ubyte"] = idx((np.arange(count) % 10).astype(np.uint8))
    return files


def write_fashion_mnist(folder: Path, train: int, test: int, packed: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in fashion_mnist(train, test).items():
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data, mtime=0) if packed else data)
    return folder


def cifar10_batch(seed: int, records: int = 10) -> bytes:
    """The classes take turns; the planes are constant 10·class, 10·class + 1 and 10·class + 2, but for noise in the first pixel."""
    classes = np.arange(records) % 10
    planes = (10 * classes[:, None, None] + np.arange(3)[:, None] + np.zeros(1024)).astype(np.uint8)  # [N, C, H·W]
    planes[:, :, 0] = np.random.default_rng(seed).integers(0, 256, (records, 3))
    return np.concatenate([classes[:, None].astype(np.uint8), planes.reshape(records, -1)], axis=1).tobytes()


def write_cifar10(folder: Path, records: int = 10) -> Path:
    """The six files of the binary version, each with so many records."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(reversed(cifar10.BATCH_FILES)):
        (folder / name).write_bytes(cifar10_batch(seed, records))
    return folder
