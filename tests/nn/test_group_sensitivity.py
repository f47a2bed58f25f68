"""Each group is scored alone, and shares follow from the scores."""

import copy

import pytest
import torch
from small_networks import resnet8

from deployopt.data import Dataset
from deployopt.nn import group_sensitivity as sensitivity
from deployopt.nn import pruning, training
from deployopt.nn.schedule import TrainingConfig
from deployopt.tasks import classification


def test_a_group_of_dead_channels_costs_nothing_and_the_network_stays(colours: Dataset) -> None:
    net = resnet8(colours.preprocessing, outputs=3)
    training.fit(net, colours, classification, TrainingConfig(epochs=4, batch_size=16, warmup_epochs=0.0))
    with torch.no_grad():  # half of one group does nothing
        for parameter in (net.body.layer1[0].bn1.weight, net.body.layer1[0].bn1.bias, net.body.layer1[0].conv1.weight):
            parameter[::2] = 0
        net.body.layer1[0].conv2.weight[:, ::2] = 0
    before = copy.deepcopy(net.state_dict())
    cuts = pruning.survey(net, pruning.Rules())
    found = sensitivity.scan(net, cuts, colours.validation, classification, (0.5, 0.9))
    rows = {row["name"]: row["scores"] for row in found["groups"]}
    assert set(rows) == {g.name for g in cuts.groups}
    assert found["whole"] > 0.9
    assert rows["body.layer1.0.conv1"][0] == found["whole"]
    assert min(min(scores) for scores in rows.values()) < 0.8
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert net.lineage == []


def test_a_share_of_less_than_a_channel_cuts_one(colours: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    net = resnet8(colours.preprocessing, outputs=3)
    cuts, kept = pruning.survey(net, pruning.Rules()), []
    history = pruning.Group.history
    monkeypatch.setattr(pruning.Group, "history", lambda group, keep: kept.append(group.size - keep) or history(group, keep))  # type: ignore[func-returns-value]
    sensitivity.scan(net, cuts, colours.validation, classification, (0.001, 0.5))
    assert kept[::2] == [1] * len(cuts.groups)
    assert kept[1::2] == [g.size // 2 for g in cuts.groups]


FOUND = {
    "whole": 0.9,
    "ratios": [0.25, 0.5],
    "groups": [{"name": "robust", "channels": 16, "scores": [0.9, 0.89]}, {"name": "fragile", "channels": 16, "scores": [0.7, 0.4]}],
}


def test_shares_rise_from_nothing_to_all_that_may_go_and_fragile_groups_lose_less() -> None:
    share = sensitivity.shares(FOUND, higher_is_better=True, max_layer_ratio=0.8)
    for name in ("robust", "fragile"):
        found = [share(name, ratio / 20) for ratio in range(21)]
        assert found[0] == 0
        assert found[-1] == pytest.approx(0.8)
        assert found == sorted(found)
    assert share("fragile", 0.4) == pytest.approx(0.25, abs=0.02)  # 0.2 of the worst loss of 0.5
    assert share("robust", 0.4) > 0.5


def test_errors_are_lower_is_better_and_no_loss_at_all_is_uniform() -> None:
    errors = {**FOUND, "whole": 0.1, "groups": [{"name": "robust", "scores": [0.1, 0.11]}, {"name": "fragile", "scores": [0.3, 0.6]}]}
    share = sensitivity.shares(errors, higher_is_better=False, max_layer_ratio=0.8)
    assert share("fragile", 0.4) < 0.3 < share("robust", 0.4)
    level = {**FOUND, "groups": [{"name": name, "scores": [0.9, 0.95]} for name in ("a", "b")]}
    share = sensitivity.shares(level, higher_is_better=True, max_layer_ratio=0.8)
    assert share("a", 0.3) == share("b", 0.3)
    assert 0 < share("a", 0.3) < 0.8
