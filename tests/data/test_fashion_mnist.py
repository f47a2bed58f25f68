"""Fashion-MNIST from small IDX files made here, and from the real ones where they are installed."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
from published_files import idx, write_fashion_mnist

from deployopt.data import fashion_mnist
from deployopt.errors import ArtifactError, DataNotFound

COUNTS = {"train": 40, "test": 20}


def config(folder: Path, **options: object) -> fashion_mnist.Config:
    return fashion_mnist.Config(folder=str(folder), **options)


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_become_three_splits(tmp_path: Path, packed: bool) -> None:
    data = fashion_mnist.load(config(write_fashion_mnist(tmp_path, **COUNTS, packed=packed), validation_fraction=0.25, image_size=28))
    assert [len(s) for s in (data.train, data.validation, data.test)] == [30, 10, 20]
    assert data.test.targets.tolist() == [i % 10 for i in range(20)]
    first = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    together = {s.raw(i)[..., 0].tobytes() for s in (data.train, data.validation) for i in range(len(s))}
    assert together == {image.tobytes() for image in first}


def test_a_limit_takes_every_class_and_leaves_test_whole(tmp_path: Path) -> None:
    data = fashion_mnist.load(config(write_fashion_mnist(tmp_path, **COUNTS), limit=20, validation_fraction=0.5))
    assert np.bincount(data.train.targets).tolist() == [1] * 10
    assert len(data.test) == 20


def test_the_fingerprint_is_of_contents_not_of_times_or_places(tmp_path: Path) -> None:
    one, two = write_fashion_mnist(tmp_path / "one", **COUNTS), write_fashion_mnist(tmp_path / "two", **COUNTS)
    assert fashion_mnist.fingerprint(config(one)) == fashion_mnist.fingerprint(config(two, download=True))
    assert fashion_mnist.fingerprint(config(one)) != fashion_mnist.fingerprint(config(one, limit=20))
    (two / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(20, np.uint8))))
    assert fashion_mnist.fingerprint(config(one)) != fashion_mnist.fingerprint(config(two))


def test_planning_downloads_nothing_and_the_fingerprint_stays(site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    write_fashion_mnist(site.folder, **COUNTS)
    published = {name: hashlib.md5((site.folder / f"{name}.gz").read_bytes()).hexdigest() for name in fashion_mnist.MD5}
    monkeypatch.setattr(fashion_mnist, "MIRROR", site.url)
    monkeypatch.setattr(fashion_mnist, "MD5", published)
    folder = tmp_path / "absent"
    before = fashion_mnist.fingerprint(config(folder, download=True))
    assert not folder.exists()
    assert len(fashion_mnist.load(config(folder, download=True)).test) == 20
    assert fashion_mnist.fingerprint(config(folder, download=True)) == before
    assert fashion_mnist.fingerprint(config(folder)) == before
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()  # one file is fetched again, the others stay
    assert fashion_mnist.fingerprint(config(folder, download=True)) == before
    assert len(fashion_mnist.load(config(folder, download=True)).test) == 20


def test_missing_files_are_named_with_the_places_and_the_remedy(tmp_path: Path) -> None:
    (write_fashion_mnist(tmp_path, **COUNTS) / "t10k-labels-idx1-ubyte.gz").unlink()
    for call in (fashion_mnist.fingerprint, fashion_mnist.load):
        with pytest.raises(DataNotFound, match=r"(?s)lacks t10k-labels-idx1-ubyte.*data\.download: true"):
            call(config(tmp_path))


GOOD = idx(np.zeros((2, 3), np.uint8))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a", b"\0\0\x09\x02" + GOOD[4:], r"wanted IDX magic 00000802 .* found '00000902'"),
        ("a", GOOD[:9], "truncated inside its header"),
        ("a", GOOD[:-1], r"announces \(2, 3\) = 6 bytes, 5 follow"),
        ("a", GOOD + b"x", "7 follow"),
        ("a.gz", gzip.compress(GOOD, mtime=0)[:-6], "broken gzip"),  # without the time: workers must collect tests of the same names
        ("a.gz", b"plain", "broken gzip"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"^{name}: .*{message}"):
        fashion_mnist.read_idx(tmp_path / name, 2)


@pytest.mark.parametrize(
    ("labels", "message"), [(np.zeros(39, np.uint8), "40 images but 39 labels"), (np.full(40, 10, np.uint8), "label 10 found, wanted 0–9")]
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    (write_fashion_mnist(tmp_path, **COUNTS, packed=False) / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(ArtifactError, match=message):
        fashion_mnist.load(config(tmp_path))


@pytest.mark.skipif(not fashion_mnist.DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_real_files_have_the_documented_statistics() -> None:
    options = fashion_mnist.Config(limit=2000)
    data = fashion_mnist.load(options)
    assert len(data.test) == 10_000
    assert np.bincount(data.train.targets).tolist() == [180] * 10
    images = np.stack([data.train.raw(i)[..., 0] for i in range(len(data.train))]) / 255
    assert images.mean() == pytest.approx(options.mean[0], abs=0.01)
    assert images.std() == pytest.approx(options.std[0], abs=0.01)
