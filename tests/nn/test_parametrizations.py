"""Weights that weight_norm and its like compute: trained so, and plain where they are cut, quantised and exported."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations as by_pytorch
from torch.nn.utils import parametrize

from deployopt.errors import ArtifactMismatch, UsageError
from deployopt.nn import checkpoint, models, parametrizations, pruning, session
from deployopt.nn.export import deployed
from deployopt.nn.models import Network
from deployopt.nn.prepared import Prepared, Scheme
from deployopt.nn.quantizer import fake_quantized
from deployopt.runtime.preprocessing import Preprocessing
from deployopt.runtime.session import SessionOptions

PREPROCESSING = Preprocessing(8, 3, None, (0.5,) * 3, (0.25,) * 3)
Wrap = Callable[[nn.Module], nn.Module]


def make_plugin(monkeypatch: pytest.MonkeyPatch, wrap: Wrap) -> None:
    """The model "wrapped", whose first convolution and head went through `wrap`."""

    def wrapped(num_outputs: int) -> nn.Module:
        first, head = wrap(nn.Conv2d(3, 8, 3, padding=1)), wrap(nn.Linear(16, num_outputs))
        return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)

    monkeypatch.setattr(models.plugins, "names", lambda kind: ["wrapped"])
    monkeypatch.setattr(models.plugins, "find", lambda kind, name: wrapped)


@pytest.fixture(params=[by_pytorch.weight_norm, by_pytorch.spectral_norm, by_pytorch.orthogonal], ids=["weight_norm", "spectral_norm", "orthogonal"])
def network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Network:
    make_plugin(monkeypatch, request.param)
    torch.manual_seed(0)
    made = models.build({"arch": "wrapped", "outputs": 5}, PREPROCESSING).train()
    made(images())
    return made.eval()


def images(count: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def outputs(module: nn.Module) -> torch.Tensor:
    return module.eval()(images())  # type: ignore[no-any-return]


def test_the_weights_stay_what_they_were_and_copies_keep_theirs(network: Network) -> None:
    wanted, other = outputs(network), copy.deepcopy(network)
    network.body[0].parametrizations.requires_grad_(False)
    assert parametrizations.remove(network.train()) == ["body.0", "body.7"]
    assert type(network.body[0]) is nn.Conv2d
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["body.0.weight"]
    assert torch.equal(outputs(network), wanted)
    assert network.lineage == [{"op": "remove_parametrizations", "modules": ["body.0", "body.7"]}]
    assert parametrizations.remove(network) == []
    assert len(network.lineage) == 1
    assert parametrizations.modules(other) == ["body.0", "body.7"]
    assert torch.equal(outputs(other), wanted)


def test_a_network_cut_without_them_is_rebuilt_from_its_folder(network: Network, tmp_path: Path) -> None:
    parametrizations.remove(network)
    pruning.prune(network, pruning.survey(network, pruning.Rules()).smallest_macs)
    checkpoint.save(tmp_path, network)
    assert network.body[0].out_channels < 8
    assert torch.equal(outputs(checkpoint.load(tmp_path)), outputs(network))


def test_all_layers_are_quantised_and_their_training_is_not_lost(network: Network) -> None:
    prepared = Prepared(network, Scheme())
    prepared.calibrate([images()])
    assert set(prepared.tensors) == {"body.0", "body.3", "body.7"}
    before = network.body[0].weight.detach().clone()
    prepared.train()(images()).square().sum().backward()
    torch.optim.SGD(prepared.parameters(), 0.01).step()
    wanted = outputs(prepared)
    prepared.write_back(network)
    assert not torch.equal(network.body[0].weight, before)
    assert [entry["op"] for entry in network.lineage] == ["remove_parametrizations", "quantize"]
    torch.testing.assert_close(outputs(fake_quantized(network)), wanted, atol=1e-3, rtol=0)


def test_a_float_export_folds_the_weight_and_leaves_the_network(network: Network) -> None:
    graph_module = deployed(network)
    assert not [n for n in graph_module.graph.nodes if n.target in (torch.ops.aten.batch_norm.default, torch.ops.aten._weight_norm_interface.default)]  # type: ignore[union-attr]
    assert "body.0.weight" in dict(graph_module.named_parameters())
    torch.testing.assert_close(outputs(graph_module), outputs(network))
    assert parametrize.is_parametrized(network.body[0])


def test_a_lineage_of_other_code_is_refused(network: Network) -> None:
    with pytest.raises(ArtifactMismatch, match=r"of the module body\.3, and this network has them at body\.0, body\.7"):
        parametrizations.replay(network, ["body.0", "body.3"])


@pytest.mark.parametrize("function", ["weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_hooks_from_before_parametrizations_are_refused(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_plugin(monkeypatch, getattr(utils, function))
    with pytest.raises(UsageError, match=rf"wrapped: the weight of 0 is computed by a hook of torch\.nn\.utils\.{function}") as caught:
        models.build({"arch": "wrapped", "outputs": 5}, PREPROCESSING)
    assert caught.value.remedy == f"apply torch.nn.utils.parametrizations.{function} instead"


def test_sessions_run_the_weights_that_exports_hold(network: Network, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, network)
    with session.open(tmp_path, SessionOptions(threads=1)) as opened:
        assert parametrizations.modules(opened._module) == []
        found = opened.infer({"input": images().numpy()})["output"]
    torch.testing.assert_close(torch.from_numpy(found), outputs(network))
