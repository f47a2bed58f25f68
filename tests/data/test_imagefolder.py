"""Your own images: splits, errors, and fingerprints over real image files."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from deployopt.data import imagefolder
from deployopt.errors import ArtifactError, DataNotFound

COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0)}


def write(root: Path, **counts: int) -> Path:
    """`counts` images a class and split, of sizes that differ; grey level of the corner tells them apart."""
    for split, count in counts.items():
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20 + i, 16), colour).save(folder / f"{split}{i}.png")
    return root


def config(root: Path, **options: object) -> imagefolder.Config:
    return imagefolder.Config(folder=str(root), image_size=8, resize=10, **options)


def test_without_test_the_val_folder_is_test_and_validation_is_carved_from_train(tmp_path: Path) -> None:
    data = imagefolder.load(config(write(tmp_path, train=5, val=2), validation_fraction=0.2))
    assert data.classes == ("blue", "red")
    assert [len(s) for s in (data.train, data.validation, data.test)] == [8, 2, 4]
    assert data.test.targets.tolist() == [0, 0, 1, 1]
    images = data.test.images([0, 3])
    assert images.shape == (2, 8, 8, 3)
    assert images[0, 4, 4].tolist() == [0, 0, 255]
    assert images[1, 4, 4].tolist() == [255, 0, 0]
    assert data.train.raw(0).shape[0] == 16
    used = {p.name + p.parent.name for s in (data.train, data.validation) for p in s._paths}
    assert len(used) == 10


def test_with_test_every_folder_is_its_split(tmp_path: Path) -> None:
    data = imagefolder.load(config(write(tmp_path, train=5, val=3, test=2)))
    assert [len(s) for s in (data.train, data.validation, data.test)] == [10, 6, 4]


def test_grey_channels_and_straight_resizing(tmp_path: Path) -> None:
    root = write(tmp_path, train=3, val=1)
    data = imagefolder.load(imagefolder.Config(folder=str(root), image_size=8, resize=None, channels=1, mean=[0.5], std=[0.25]))
    assert data.test.images([0, 1]).shape == (2, 8, 8, 1)
    assert np.unique(data.test.images([1])).tolist() == [76]  # luma of red: 0.299 · 255


def test_the_fingerprint_follows_files_and_options_but_not_the_place(tmp_path: Path) -> None:
    root = write(tmp_path / "a", train=3, val=1)
    plain = imagefolder.fingerprint(config(root))
    root.rename(tmp_path / "b")
    moved = tmp_path / "b"
    assert imagefolder.fingerprint(config(moved, workers=2)) == plain
    assert imagefolder.fingerprint(config(moved, split_seed=1)) != plain
    (moved / "train" / "notes.txt").write_text("no image")
    assert imagefolder.fingerprint(config(moved)) == plain
    os.utime(moved / "train" / "red" / "train0.png", ns=(1, 1))
    assert imagefolder.fingerprint(config(moved)) != plain


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataNotFound, match="lacks the folders train and val"):
        imagefolder.fingerprint(config(tmp_path / "nowhere"))
    root = write(tmp_path / "one", train=1, val=1)
    (root / "val" / "red" / "val0.png").unlink()
    (root / "val" / "blue" / "val0.png").unlink()
    with pytest.raises(DataNotFound, match=r"val holds no image \(\.bmp"):
        imagefolder.load(config(root))
    (root / "train" / "red" / "train0.png").unlink()
    with pytest.raises(DataNotFound, match="red holds no image"):
        imagefolder.load(config(root))
    (root / "train" / "red").rmdir()
    with pytest.raises(DataNotFound, match="has 1 class folders, wanted at least two"):
        imagefolder.load(config(root))


def test_a_class_that_train_has_not_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path, train=3, val=1)
    (root / "val" / "green").mkdir()
    with pytest.raises(ArtifactError, match="class folders that train has not: green"):
        imagefolder.load(config(root))


def test_a_broken_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    root = write(tmp_path, train=3, val=1)
    (root / "val" / "red" / "val0.png").write_bytes(b"\x89PNG broken")
    data = imagefolder.load(config(root))
    with pytest.raises(ArtifactError, match=r"val0\.png: cannot be decoded"):
        data.test.images([0, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"channels": 2}, "channels is 1 or 3"), ({"mean": [0.5]}, "as many values"), ({"resize": 8, "image_size": 9}, "must not be smaller")],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        imagefolder.Config(folder="x", **options)
