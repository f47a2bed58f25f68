"""CIFAR-10 from small files of the binary version's layout made here."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from published_files import cifar10_batch, write_cifar10

from deployopt.data import cifar10
from deployopt.errors import ArtifactError, DataNotFound


def archive(path: Path, names: tuple[str, ...] = cifar10.BATCH_FILES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for seed, name in enumerate(reversed(names)):  # the order in the archive does not matter
            data = cifar10_batch(seed)
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def config(folder: Path, **options: object) -> cifar10.Config:
    return cifar10.Config(folder=str(folder), validation_fraction=0.2, **options)


def test_planes_become_pixels(tmp_path: Path) -> None:
    images, targets = cifar10.read_batch("b", cifar10_batch(0))
    assert images.shape == (10, 32, 32, 3)
    assert targets.tolist() == list(range(10))
    assert images[7, 31, 31].tolist() == [70, 71, 72]
    data = cifar10.load(config(write_cifar10(tmp_path)))
    assert [len(s) for s in (data.train, data.validation, data.test)] == [40, 10, 10]
    assert data.classes[7] == "horse"


def test_unpacked_files_and_archive_give_the_same_images(tmp_path: Path) -> None:
    archive(tmp_path / "packed" / cifar10.ARCHIVE)
    one, two = cifar10.load(config(write_cifar10(tmp_path / "plain"))), cifar10.load(config(tmp_path / "packed"))
    for a, b in ((one.train, two.train), (one.validation, two.validation), (one.test, two.test)):
        np.testing.assert_array_equal(a.images(range(len(a))), b.images(range(len(b))))
        np.testing.assert_array_equal(a.targets, b.targets)


def test_planning_downloads_nothing_and_the_fingerprint_stays(site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    served = archive(site.folder / cifar10.ARCHIVE)
    monkeypatch.setattr(cifar10, "URL", f"{site.url}{cifar10.ARCHIVE}")
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5(served.read_bytes()).hexdigest())
    folder = tmp_path / "absent"
    before = cifar10.fingerprint(config(folder, download=True))
    assert not folder.exists()
    assert len(cifar10.load(config(folder, download=True)).test) == 10
    assert cifar10.fingerprint(config(folder, download=True)) == before
    assert cifar10.fingerprint(config(folder)) == before
    assert cifar10.fingerprint(config(folder, limit=20)) != before


def test_the_fingerprint_is_of_contents(tmp_path: Path) -> None:
    one, two = write_cifar10(tmp_path / "one"), write_cifar10(tmp_path / "two")
    assert cifar10.fingerprint(config(one)) == cifar10.fingerprint(config(two))
    (two / "test_batch.bin").write_bytes(cifar10_batch(99))
    assert cifar10.fingerprint(config(one)) != cifar10.fingerprint(config(two))


def test_missing_files_are_named_with_the_remedy(tmp_path: Path) -> None:
    (write_cifar10(tmp_path) / "data_batch_3.bin").unlink()
    for call in (cifar10.fingerprint, cifar10.load):
        with pytest.raises(DataNotFound, match=r"(?s)or data_batch_3\.bin\).*data\.download: true"):
            call(config(tmp_path))


@pytest.mark.parametrize(
    ("data", "message"), [(b"", "0 bytes"), (cifar10_batch(0)[:-1], "not a whole number"), (b"\x0a" + cifar10_batch(0)[1:], "label 10 in record 0")]
)
def test_a_damaged_batch_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    (write_cifar10(tmp_path) / "data_batch_2.bin").write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"data_batch_2\.bin: .*{message}"):
        cifar10.load(config(tmp_path))


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    path = archive(tmp_path / cifar10.ARCHIVE)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not gzipped"):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"cifar-10-binary\.tar\.gz cannot be unpacked"):
            cifar10.load(config(tmp_path))
    archive(path, cifar10.BATCH_FILES[:-1])
    with pytest.raises(ArtifactError, match=r"holds no test_batch\.bin"):
        cifar10.load(config(tmp_path))
