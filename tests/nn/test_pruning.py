"""Cuts reach their target, keep the outputs, and are rebuilt exactly from their history."""

from pathlib import Path

import pytest
import torch

from deployopt.errors import PruningImpossible
from deployopt.nn import checkpoint, macs, models, pruning
from deployopt.nn.models import Network
from deployopt.runtime.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(16, 3, None, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def network(arch: str = "resnet20", stem: str | None = None) -> Network:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return models.build({"arch": arch, "stem": stem, "outputs": 7}, PREPROCESSING)


@pytest.mark.parametrize(("arch", "stem"), [("resnet20", None), ("resnet18", "small"), ("resnext50_32x4d", "small")])
@pytest.mark.parametrize("across_layers", [False, True])
def test_target_is_met_and_replay_is_exact(arch: str, stem: str | None, across_layers: bool, tmp_path: Path) -> None:
    net = network(arch, stem).train()
    net.body.get_submodule("fc").weight.requires_grad_(False)
    target = int(macs.count(net, net.input_shape)[1] * 0.5)
    history = pruning.prune(net, target, across_layers=across_layers)
    reached = macs.count(net, net.input_shape)[1]
    assert 0.95 * target <= reached <= target
    assert net.training
    assert not net.body.get_submodule("fc").weight.requires_grad
    assert net.lineage == [{"op": "prune", "history": history}]
    checkpoint.save(tmp_path, net)
    x = torch.rand(3, 3, 16, 16)
    with torch.inference_mode():
        wanted, found = net.eval()(x), checkpoint.load(tmp_path)(x)
    assert wanted.shape == (3, 7)
    assert torch.equal(wanted, found)


def test_a_pruned_network_is_pruned_again(tmp_path: Path) -> None:
    net = network()
    whole = macs.count(net, net.input_shape)[0]
    for ratio in (0.7, 0.4):
        pruning.prune(net, int(whole * ratio), metric="params", criterion="bn_scale")
    assert macs.count(net, net.input_shape)[0] <= 0.4 * whole
    checkpoint.save(tmp_path, net)
    assert macs.count(checkpoint.load(tmp_path), net.input_shape) == macs.count(net, net.input_shape)


def test_an_unreachable_target_says_the_best() -> None:
    with pytest.raises(PruningImpossible, match="the best reached is"):
        pruning.prune(network(), 1000)


def test_macs_are_the_analytic_ones() -> None:
    conv = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4), torch.nn.Flatten(), torch.nn.Linear(512, 5)
    )
    assert macs.count(conv, (3, 16, 16)) == (3 * 72 + 8 + 8 * 18 + 8 + 512 * 5 + 5, 16 * 16 * 8 * 27 + 8 * 8 * 8 * 18 + 512 * 5)
