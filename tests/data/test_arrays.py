"""Splits and in-memory images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployopt.data import _arrays
from deployopt.data._arrays import ArraySet, stratified_split, stratified_subset
from deployopt.runtime.preprocessing import Preprocessing


@given(st.lists(st.integers(0, 4), min_size=10, max_size=200), st.floats(0.05, 0.9), st.integers(0, 5))
def test_a_split_shares_no_image_and_takes_its_part_of_every_class(labels: list[int], fraction: float, seed: int) -> None:
    targets = np.array(labels)
    kept, held = stratified_split(targets, fraction, seed)
    assert sorted([*kept, *held]) == list(range(len(targets)))
    for label in np.unique(targets):
        count = int((targets == label).sum())
        assert (targets[held] == label).sum() == max(1, round(count * fraction))
    again = stratified_split(targets, fraction, seed)
    assert all((a == b).all() for a, b in zip((kept, held), again, strict=True))


def test_a_split_is_the_same_on_every_machine() -> None:
    assert stratified_split(np.arange(20) % 2, 0.2, seed=0)[1].tolist() == [5, 8, 12, 19]


def test_a_subset_represents_every_class_and_is_never_larger_than_the_whole() -> None:
    targets = np.repeat([0, 1], [90, 10])
    assert np.bincount(targets[stratified_subset(targets, 20, 0)]).tolist() == [18, 2]
    assert stratified_subset(targets, 500, 0).tolist() == list(range(100))


@pytest.mark.parametrize("kept_bytes", [1 << 30, 0])
def test_images_are_the_same_whether_kept_or_made_on_access(kept_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (5, 12, 10, 1), np.uint8)
    reference = ArraySet(stored, np.arange(5), Preprocessing(8)).images(range(5))
    monkeypatch.setattr(_arrays, "KEPT_BYTES", kept_bytes)
    images = ArraySet(stored, np.arange(5), Preprocessing(8))
    assert images.images([3, 1]).shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(images.images([3, 1]), reference[[3, 1]])
    np.testing.assert_array_equal(images.raw(2), np.repeat(stored[2], 3, axis=-1))
    assert len(images) == 5


def test_images_and_targets_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="2 images but 3 targets"):
        ArraySet(np.zeros((2, 8, 8, 1), np.uint8), np.zeros(3), Preprocessing(8))
