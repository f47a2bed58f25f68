"""The digits of scikit-learn."""

import numpy as np

from deployopt.data import digits


def test_three_stratified_splits_share_no_image() -> None:
    data = digits.load(digits.Config(image_size=8))
    assert [len(s) for s in (data.train, data.validation, data.test)] == [1069, 189, 539]
    assert data.classes == tuple("0123456789")
    images = np.concatenate([s.images(range(len(s))) for s in (data.train, data.validation, data.test)])
    assert images.shape == (1797, 8, 8, 3)
    assert images.max() == 255
    assert np.bincount(data.test.targets).min() >= 50
    mean = data.train.images(range(len(data.train))).mean() / 255
    assert abs(mean - data.preprocessing.mean[0]) < 0.01


def test_the_fingerprint_follows_what_changes_the_data() -> None:
    plain = digits.fingerprint(digits.Config())
    assert plain == digits.fingerprint(digits.Config())
    assert len({plain, digits.fingerprint(digits.Config(split_seed=1)), digits.fingerprint(digits.Config(image_size=64))}) == 3
