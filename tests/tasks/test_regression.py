"""Regression metrics against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from deployopt.errors import UsageError
from deployopt.tasks import regression

RANDOM = np.random.default_rng(0)
TARGETS = RANDOM.standard_normal((300, 2)).astype(np.float32)
OUTPUTS = TARGETS + RANDOM.normal(0, [0.1, 0.5], (300, 2)).astype(np.float32)


def test_scores_are_scikit_learns() -> None:
    scores = regression.score(OUTPUTS, TARGETS)
    assert scores["mae"] == pytest.approx(mean_absolute_error(TARGETS, OUTPUTS), rel=1e-5)
    assert scores["rmse"] == pytest.approx(np.sqrt(((OUTPUTS - TARGETS) ** 2).mean()), rel=1e-5)
    assert scores["r2"] == pytest.approx(r2_score(TARGETS, OUTPUTS), rel=1e-5)
    assert scores["n"] == 300
    single = regression.score(OUTPUTS[:, :1], TARGETS[:, :1])
    assert single["rmse"] == pytest.approx(root_mean_squared_error(TARGETS[:, :1], OUTPUTS[:, :1]), rel=1e-5)


@pytest.mark.parametrize("error", [0.0, 1.0])
def test_r2_of_a_constant_target_is_scikit_learns(error: float) -> None:
    targets = np.full((4, 1), 3.0, np.float32)
    assert regression.score(targets + np.float32(error), targets)["r2"] == r2_score(targets, targets + error)


def test_agreement_asks_every_output_of_an_image_to_be_near() -> None:
    other = TARGETS.copy()
    other[:60, 1] += 0.06 * TARGETS[:, 1].std()
    other[60:90, 0] += 0.04 * TARGETS[:, 0].std()
    assert regression.agree(other, TARGETS)["agreement"] == pytest.approx(0.8)
    assert regression.agree(TARGETS, TARGETS) == {"agreement": 1.0, "max_abs_diff": 0.0}


def test_details_are_quantiles_of_the_signed_error() -> None:
    quantiles = regression.details(OUTPUTS + 1, TARGETS, ())["error_quantiles"]
    assert quantiles["levels"] == [0.05, 0.25, 0.5, 0.75, 0.95]
    values = np.array(quantiles["values"])
    assert values.shape == (2, 5)
    np.testing.assert_allclose(values[:, 2], 1, atol=0.1)
    np.testing.assert_allclose(values[0, 4] - values[0, 0], 2 * 1.645 * 0.1, rtol=0.2)


def test_the_head_has_one_output_a_target() -> None:
    assert regression.head_width(TARGETS, ()) == 2
    with pytest.raises(UsageError, match=r"(?s)int64 \[5\].*task: classification"):
        regression.head_width(np.arange(5), ("a",))
