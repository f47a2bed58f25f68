"""Random changes of training images: seeded, in bounds, and only what was asked for."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deployopt.data import Dataset
from deployopt.data._arrays import ArraySet
from deployopt.data.imagefolder import FolderSet
from deployopt.errors import ArtifactError
from deployopt.nn import augment
from deployopt.nn.schedule import Augment
from deployopt.runtime.preprocessing import Preprocessing


def random(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def epoch(data: Dataset, options: Augment, batch_size: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    parts = list(augment.batches(data.train, batch_size, options, data.preprocessing.image_size, random(seed)))
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def test_an_epoch_is_every_image_once_in_shuffled_order(colours: Dataset) -> None:
    images, indices = epoch(colours, Augment())
    assert sorted(indices) == list(range(96))
    assert (indices != np.arange(96)).any()
    np.testing.assert_array_equal(images, colours.train.images(indices))


def test_a_smaller_last_batch_is_left_out_unless_it_is_the_only_one(colours: Dataset) -> None:
    assert len(epoch(colours, Augment(), batch_size=40)[1]) == 80
    assert len(epoch(colours, Augment(), batch_size=200)[1]) == 96


@pytest.mark.parametrize("options", [Augment(crop_padding=2, horizontal_flip=True), Augment(resized_crop=0.3, horizontal_flip=True)])
def test_a_seed_repeats_every_change(colours: Dataset, options: Augment) -> None:
    one, two, other = epoch(colours, options), epoch(colours, options), epoch(colours, options, seed=1)
    np.testing.assert_array_equal(one[0], two[0])
    assert one[0].shape == (96, 8, 8, 3)
    assert one[0].dtype == np.uint8
    assert (one[0] != colours.train.images(one[1])).any()
    assert (other[1] != one[1]).any()


def test_every_second_image_is_mirrored(colours: Dataset) -> None:
    images, indices = epoch(colours, Augment(horizontal_flip=True))
    plain = colours.train.images(indices)
    same, mirrored = (images == plain).all((1, 2, 3)), (images == plain[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 30 < mirrored.sum() < 66


def test_a_shifted_image_is_black_where_nothing_was() -> None:
    images = np.full((200, 6, 6, 1), 255, np.uint8)
    moved = augment.shift(images, 2, random().integers(0, 5, (2, 200)))
    kept = (moved[..., 0] == 255).sum((1, 2))
    assert set(np.unique(moved)) == {0, 255}
    assert kept.min() == 4 * 4
    assert kept.max() == 6 * 6
    assert set(kept) == {a * b for a in (4, 5, 6) for b in (4, 5, 6)}


def test_a_resized_crop_takes_a_part_of_the_stored_image() -> None:
    gradient = np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None].repeat(64, 0)  # [64, 64, 1], brighter to the right
    crops = np.stack([augment.resized_crop(gradient, 16, 0.1, np.random.Generator(np.random.PCG64(i))) for i in range(40)])
    spread = crops[..., 0].max((1, 2)).astype(int) - crops[..., 0].min((1, 2))
    assert crops.shape == (40, 16, 16, 1)
    assert spread.min() < 130
    assert spread.max() > 180
    assert (np.diff(crops[..., 0].astype(int), axis=2) >= 0).all()


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 1), st.integers(0, 1000))
def test_a_crop_lies_inside_the_image(height: int, width: int, smallest: float, seed: int) -> None:
    top, left, h, w = augment._crop_box(height, width, smallest, random(seed))
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h > 0
    assert w > 0


def test_the_two_crops_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="exclude each other"):
        Augment(crop_padding=2, resized_crop=0.5)


def test_grey_images_are_cropped_to_the_networks_channels() -> None:
    preprocessing = Preprocessing(8, 3, None)
    images = ArraySet(np.arange(4 * 10 * 10, dtype=np.uint8).reshape(4, 10, 10, 1), np.arange(4), preprocessing)
    ((batch, _),) = augment.batches(images, 4, Augment(resized_crop=0.5), 8, random())
    assert batch.shape == (4, 8, 8, 3)
    assert (batch[..., 0] == batch[..., 2]).all()


def test_an_image_that_cannot_be_decoded_ends_the_epoch_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    images = FolderSet([tmp_path / "broken.jpg"] * 4, np.zeros(4, np.int64), Preprocessing(8), workers=1)
    with pytest.raises(ArtifactError, match=r"broken\.jpg"):
        next(augment.batches(images, 2, Augment(), 8, random()))
