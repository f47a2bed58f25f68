"""Losses against their formulas."""

import math

import pytest
import torch

from deployopt.errors import UsageError
from deployopt.nn.losses import Distillation, by_name

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
TARGETS = torch.tensor([0, 1])


def test_cross_entropy_is_the_mean_negative_log_likelihood() -> None:
    expected = -(LOGITS.log_softmax(1)[0, 0] + LOGITS.log_softmax(1)[1, 1]) / 2
    assert float(by_name("cross_entropy")(LOGITS, TARGETS)) == pytest.approx(float(expected))


def test_label_smoothing_spreads_its_share_over_all_classes() -> None:
    plain, spread = by_name("cross_entropy")(LOGITS, TARGETS), -LOGITS.log_softmax(1).mean()
    assert float(by_name("cross_entropy", 0.2)(LOGITS, TARGETS)) == pytest.approx(float(0.8 * plain + 0.2 * spread), rel=1e-5)


def test_smooth_l1_is_quadratic_near_zero_and_linear_far() -> None:
    value = by_name("smooth_l1")(torch.tensor([[0.5], [3.0]]), torch.zeros(2, 1))
    assert float(value) == pytest.approx((0.5 * 0.5**2 + (3 - 0.5)) / 2)


def test_distillation_is_temperature_squared_times_the_divergence() -> None:
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    t = 2.0
    p = [1 / (1 + math.exp(2 / t)), 1 / (1 + math.exp(-2 / t))]
    q = [1 / (1 + math.exp(-1 / t)), 1 / (1 + math.exp(1 / t))]
    expected = t**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(Distillation(temperature=t).distance("cross_entropy", student, teacher)) == pytest.approx(expected, rel=1e-5)
    assert float(Distillation().distance("cross_entropy", teacher, teacher)) == pytest.approx(0, abs=1e-6)


def test_regression_is_distilled_by_squared_error() -> None:
    assert float(Distillation().distance("smooth_l1", torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2))) == pytest.approx(5.0)


def test_smoothing_classes_of_a_regression_is_refused() -> None:
    with pytest.raises(UsageError, match=r"label_smoothing \(0\.1\).*smooth_l1"):
        by_name("smooth_l1", 0.1)
