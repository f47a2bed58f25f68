"""The choice of layers to keep in float, on a made-up network whose scores and costs are known; with real ones in tests/stages/test_mixed_precision.py."""

from collections.abc import Collection, Mapping
from typing import Any

import pytest

from deployopt.errors import StageFailed
from deployopt.nn.layer_sensitivity import LEAST_COST, TIMED, LayerScores, Score, keep_few


class MadeUpStudy:
    """Distances to the parent's outputs add up: each layer in INT8 moves them by its error."""

    def __init__(self, errors: Mapping[str, float]) -> None:
        self.errors = errors
        self.layers = tuple(errors)
        self.scored: list[tuple[str, ...]] = []

    def score(self, float_layers: Collection[str], count: int | None = None) -> Score:
        self.scored.append(tuple(float_layers))
        distance = sum(error for name, error in self.errors.items() if name not in float_layers)
        return Score(distance, 1 - distance)

    def table(self) -> list[LayerScores]:
        whole = sum(self.errors.values())
        return [LayerScores(name, Score(error, 1 - error), Score(whole - error, 1 - whole + error)) for name, error in self.errors.items()]


def keep(errors: Mapping[str, float], costs: Mapping[str, float], at_most: float, *, whole: float | None = None) -> tuple[dict[str, Any], MadeUpStudy]:
    study = MadeUpStudy(errors)
    return keep_few(
        study,  # type: ignore[arg-type]
        study.table(),
        sum(errors.values()) if whole is None else whole,
        lambda score: score.distance <= at_most + 1e-9,
        lambda names: {name: costs[name] for name in names},
        describe=lambda score: f"a distance of {score.distance:.2f}",
        option="qat.mixed_precision.max_accuracy_drop_pp",
    ), study


def steps(found: Mapping[str, Any]) -> list[tuple[str | None, bool, bool]]:
    return [(step["layer"], step["kept"], step["accepted"]) for step in found["trace"]]


def test_a_network_that_is_accepted_in_int8_keeps_none_and_times_nothing() -> None:
    found, study = keep({"a": 0.1, "b": 0.2}, {}, 0.3)
    assert (found["float_layers"], found["latency_cost"], study.scored) == ([], {}, [()])


def test_layers_are_kept_by_what_they_gain_for_the_latency_they_cost() -> None:
    found, _ = keep({"a": 0.4, "b": 0.3, "c": 0.1, "d": 0.1}, {"a": 0.4, "b": 0.05, "c": 0.02, "d": 0.2}, 0.2)
    assert found["latency_cost"] == {"a": 0.4, "b": 0.05, "c": 0.02, "d": 0.2}
    # gains for each share: b 6, c 5, a 1, d 0.5; without c it still is accepted, without b not
    assert steps(found) == [(None, False, False), ("b", True, False), ("c", True, False), ("a", True, True), ("c", False, True), ("b", False, False)]
    assert found["float_layers"] == ["b", "a"]


def test_costs_within_the_noise_count_alike() -> None:
    found, _ = keep({"a": 0.3, "b": 0.2, "c": 0.1}, {"a": LEAST_COST / 2, "b": -0.02, "c": 0.5}, 0.4)
    assert found["float_layers"] == ["a"]


def test_gains_are_measured_from_the_distance_on_the_tables_images() -> None:
    """From a smaller sample's distance all gains would be zero, and the order that of the table by distance alone: the dear layer first."""
    errors, costs = {"dear": 0.4, "cheap": 0.3, "rest": 0.3}, {"dear": 0.9, "cheap": 0.01, "rest": 0.9}
    assert keep(errors, costs, 0.7)[0]["float_layers"] == ["cheap"]
    assert keep(errors, costs, 0.7, whole=0.5)[0]["float_layers"] == ["dear"]


def test_only_the_layers_with_the_most_to_gain_are_timed_and_come_first() -> None:
    names = [f"layer{i}" for i in range(TIMED + 2)]
    errors = {name: 0.01 * (i + 1) for i, name in enumerate(names)}
    found, _ = keep(errors, dict.fromkeys(names, 0.1), 0.011)
    assert set(found["latency_cost"]) == set(names[2:])
    assert [layer for layer, kept, _ in steps(found) if kept] == [*reversed(names[2:]), "layer1"]


def test_an_accuracy_that_only_the_float_network_meets_is_refused_with_the_best_and_the_option() -> None:
    with pytest.raises(StageFailed, match=r"leaves one in INT8.*best of 3 tried reaches a distance of 0\.10") as caught:
        keep({"a": 0.3, "b": 0.2, "c": 0.1}, {"a": 0.1, "b": 0.1, "c": 0.1}, 0.0)
    assert "qat.mixed_precision.max_accuracy_drop_pp" in str(caught.value.remedy)


def test_a_network_of_one_layer_is_not_left_in_float() -> None:
    with pytest.raises(StageFailed, match="best of 1 tried"):
        keep({"a": 0.3}, {"a": 0.1}, 0.0)
