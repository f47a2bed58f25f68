from __future__ import annotations

import copy
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deployopt.errors import ArtifactMismatch, ExportFailed, StageFailed
from deployopt.graph.dialects import is_non_negative
from deployopt.graph.editing import Graph, layer_name
from deployopt.nn import checkpoint, models
from deployopt.nn.capture import _inside, capture, example_input
from deployopt.nn.export import canonical, deployed, to_onnx
from deployopt.nn.fold import fold_batchnorm
from deployopt.nn.models import Network
from deployopt.nn.placement import layers
from deployopt.nn.prepared import MeanSquaredErrorObserver, MinMaxObserver, Prepared, Scheme, SiteFakeQuantize
from deployopt.nn.quantizer import fake_quantized, folded, recorded_scales, replay
from deployopt.runtime.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(16, 3, None, (0.5,) * 3, (0.25,) * 3)


def network(arch: str = "resnet8", **base: object) -> Network:
    """`resnet8` has one block a stage: every kind of layer and the fewest of them."""
    torch.manual_seed(0)
    return warmed(models.build({"arch": arch, "outputs": 10, **base}, PREPROCESSING))


def warmed(made: Network) -> Network:
    made.train()
    for _ in range(3):  # BatchNorm statistics of real forward passes
        made(images(32))
    return made.eval()


def images(count: int = 16) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Plain(nn.Module):
    """No residuals; a grouped, biased and padded-by-name convolution, unusual BatchNorm options and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8, eps=0.1, momentum=0.3)
        self.b = nn.Conv2d(8, 8, 3, groups=4, padding=1)
        self.bare = nn.BatchNorm2d(8, affine=False)
        self.c = nn.Conv2d(8, 6, 3, padding="same")
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x)))
        x = self.c(self.bare(self.b(x))).mean((2, 3))
        return self.head(self.drop(x))


def plain() -> Network:
    torch.manual_seed(0)
    return warmed(Network(Plain(), {"arch": "plain", "outputs": 10}, PREPROCESSING))


def quantized(made: Network, prepared: Prepared | None = None) -> tuple[Network, Prepared]:
    prepared = prepared or Prepared(made, Scheme())
    prepared.calibrate([images(), images() * 0.8])
    prepared.write_back(made)
    return made, prepared


@pytest.fixture(scope="module")
def prepared_once() -> dict[str, Prepared]:
    """Uncalibrated, for `prepared`: torchao takes seconds to prepare a network of any size."""
    return {"network": Prepared(network(), Scheme()), "plain": Prepared(plain(), Scheme())}


@pytest.fixture
def prepared(prepared_once: dict[str, Prepared]) -> Prepared:
    return copy.deepcopy(prepared_once["network"])


@pytest.fixture(scope="module")
def quantized_once(prepared_once: dict[str, Prepared]) -> dict[str, tuple[Network, Prepared]]:
    """For tests that change neither."""
    return {name: quantized(make(), copy.deepcopy(prepared_once[name])) for name, make in (("network", network), ("plain", plain))}


@pytest.mark.parametrize(
    ("arch", "base", "expected_layers", "adds", "downsamples"),
    [("resnet18", {"stem": "small"}, 21, 8, 3), ("resnet50", {}, 54, 16, 4), ("resnet20", {}, 22, 9, 2)],
)
def test_placement_of_resnets(arch: str, base: dict[str, object], expected_layers: int, adds: int, downsamples: int) -> None:
    made = network(arch, **base)
    found = layers(capture(made, example_input(PREPROCESSING)).graph)
    names = [layer.name for layer in found]
    wanted = [name for name, module in made.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert sorted(names) == sorted(wanted)
    assert len(found) == expected_layers
    assert sum("identity" in layer.quantized for layer in found) == adds
    read = {tensor for layer in found for _, tensor, _ in layer.edges()}
    outputs, sums = ([layer.observed[role] for layer in found if role in layer.observed] for role in ("output", "sum"))
    assert len(outputs) == expected_layers - 1
    assert sum(tensor not in read for tensor in outputs) == adds + (arch == "resnet50")  # before an Add, and before the stem's pooling
    assert len(sums) == adds
    assert sum(tensor not in read for tensor in sums) == 1
    assert [layer.name for layer in found if layer.signed_input] == ["body.conv1"]
    own = {layer.quantized["input"] for layer in found}
    assert sum(layer.quantized["identity"] not in own for layer in found if layer.add) == downsamples


def test_placement_without_residuals_keeps_an_asymmetric_weight_range_for_signed_inputs() -> None:
    found = {layer.name: layer for layer in layers(capture(plain(), example_input(PREPROCESSING)).graph)}
    assert set(found) == {"body.a", "body.b", "body.c", "body.head"}
    assert not any(layer.add for layer in found.values())
    assert found["body.b"].weight_limit(saturation_guard=True) == 127
    assert found["body.a"].weight_limit(saturation_guard=True) == 63
    assert found["body.a"].weight_limit(saturation_guard=False) == 127


class Signs(nn.Module):
    """Layers behind all that keeps a tensor from being negative, and behind what looks like it."""

    WAYS: ClassVar[dict[str, Callable[[Tensor], Tensor]]] = {
        "relu": torch.relu,
        "relu6": nn.functional.relu6,
        "sigmoid": torch.sigmoid,
        "hardsigmoid": nn.functional.hardsigmoid,
        "softmax": lambda x: x.softmax(1),
        "sum": lambda x: x.relu() + x.sigmoid(),
        "cat": lambda x: torch.cat([x[:, :4].relu(), x[:, 4:].sigmoid()], 1),
        "max_pool": lambda x: nn.functional.max_pool2d(x.relu(), 2),
        "avg_pool": lambda x: nn.functional.avg_pool2d(x.relu(), 2),
        "adaptive_max": lambda x: nn.functional.adaptive_max_pool2d(x.relu(), 1),
        "adaptive_avg": lambda x: nn.functional.adaptive_avg_pool2d(x.relu(), 1),
        "mean": lambda x: x.relu().mean((2, 3), keepdim=True),
        "mean_of_rows": lambda x: x.relu().mean(2, keepdim=True),
        "plain": lambda x: x,
        "signed_sum": lambda x: x.relu() + x,
        "signed_cat": lambda x: torch.cat([x[:, :4].relu(), x[:, 4:]], 1),
        "hardtanh": nn.functional.hardtanh,
        "signed_pool": lambda x: nn.functional.adaptive_max_pool2d(x, 1),
    }

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.after = nn.ModuleDict({name: nn.Conv2d(8, 4, 1) for name in self.WAYS})

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.cat([self.after[name](way(x)).mean((2, 3)) for name, way in self.WAYS.items()], 1)


def test_training_and_the_dialect_agree_on_what_cannot_be_negative() -> None:
    """Training leaves weights behind such a tensor unguarded, the dialect gives it the zero point 0: if only one did, products might saturate."""
    torch.manual_seed(0)
    made, _ = quantized(Network(Signs(), {"arch": "signs", "outputs": 4 * len(Signs.WAYS)}, PREPROCESSING).eval())
    trained = {layer.name: not layer.signed_input for layer in layers(folded(made).graph)}
    graph = Graph(canonical(deployed(made), made, recorded_scales(made)).graph)
    told = {layer_name(graph, node): is_non_negative(graph, node.input[0]) for node in graph.nodes("Conv")}
    assert told == trained
    signed = {"stem", *(f"after.{name}" for name in ("plain", "signed_sum", "signed_cat", "hardtanh", "signed_pool"))}
    assert {name for name, non_negative in told.items() if not non_negative} == {f"body.{name}" for name in signed}


class Padded(nn.Module):
    """Convolutions padded by name, each before a BatchNorm, and whether both sides of each axis get as much."""

    WAYS: ClassVar[dict[str, tuple[nn.Conv2d, bool]]] = {
        "same": (nn.Conv2d(3, 4, (3, 5), padding="same", dilation=(2, 1)), True),
        "valid": (nn.Conv2d(4, 4, 4, stride=2, padding="valid", groups=2, bias=False), True),
        "uneven": (nn.Conv2d(4, 4, (3, 2), padding="same"), False),
        "even": (nn.Conv2d(4, 4, 4, padding="same", dilation=2), True),
    }

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleDict({name: convolution for name, (convolution, _) in self.WAYS.items()})
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(4) for name in self.WAYS})

    def forward(self, x: Tensor) -> Tensor:
        for name in self.WAYS:
            x = self.norms[name](self.convolutions[name](x))
        return x.mean((2, 3))


def test_a_convolution_padded_by_name_folds_and_is_quantised_where_integers_say_it() -> None:
    torch.manual_seed(0)
    made = warmed(Network(Padded(), {"arch": "padded", "outputs": 4}, PREPROCESSING))
    captured = capture(made, example_input(PREPROCESSING))
    with torch.no_grad():
        assert torch.equal(captured(images()), made(images()))
    assert [layer.name for layer in layers(captured.graph)] == [f"body.convolutions.{name}" for name, (_, even) in Padded.WAYS.items() if even]
    folded = fold_batchnorm(captured)
    assert sum("batch_norm" in str(node.target) for node in folded.graph.nodes) == 1
    with torch.no_grad():
        torch.testing.assert_close(folded(images()), made(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [plain, network])
def test_folding_keeps_the_outputs(make: object) -> None:
    made = make()  # type: ignore[operator]
    folded = fold_batchnorm(capture(made, example_input(PREPROCESSING)))
    assert not any("batch_norm" in str(node.target) for node in folded.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(folded(images()), made(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "network"])
def test_written_back_scales_are_the_fake_quantisers_and_give_their_outputs(name: str, quantized_once: dict[str, tuple[Network, Prepared]]) -> None:
    made, prepared = quantized_once[name]
    (entry,) = made.lineage
    by_tensor = {site.tensor: site.scale for site in prepared.fake_quantizers()}
    for layer, site in entry["sites"].items():
        for role, scale in site.items():
            assert torch.equal(torch.tensor(scale).reshape(-1), by_tensor[prepared.tensors[layer][role]].reshape(-1))
    with torch.no_grad():
        ours, trained = fake_quantized(made)(images()), prepared(images())
        floating = made(images())
    assert (ours - trained).abs().max() < 0.5 * (ours - floating).abs().max() + 1e-3


def test_first_layer_integers_stay_within_seven_bits(quantized_once: dict[str, tuple[Network, Prepared]]) -> None:
    graph_module = fake_quantized(quantized_once["network"][0])
    assert int(graph_module.get_submodule("body.conv1").weight.abs().max()) == 63
    assert int(graph_module.get_submodule("body.fc").weight.abs().max()) == 127


def test_saved_and_loaded_network_quantizes_to_the_same_bits(tmp_path: object) -> None:
    made, _ = quantized(network("resnet20"))
    checkpoint.save(tmp_path, made)  # type: ignore[arg-type]
    loaded = checkpoint.load(tmp_path)  # type: ignore[arg-type]
    assert loaded.lineage == made.lineage
    with torch.no_grad():
        assert torch.equal(fake_quantized(loaded)(images()), fake_quantized(made)(images()))


def _trained(prepared: Prepared) -> dict[str, Tensor]:
    made = network()
    prepared.calibrate([images()])
    optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
    for step in range(4):
        if step == 2:
            prepared.freeze_batchnorm()
            prepared.freeze_observers()
        prepared.train()
        optimizer.zero_grad()
        prepared(images()).square().mean().backward()
        optimizer.step()
    prepared.write_back(made)
    scales = {f"{n}.{r}": torch.tensor(s) for n, site in made.lineage[0]["sites"].items() for r, s in site.items()}
    return {**made.state_dict(), **scales}


def test_training_twice_gives_the_same_bits_and_moves_the_weights(prepared: Prepared) -> None:
    one, two, start = _trained(copy.deepcopy(prepared)), _trained(prepared), network().state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(not torch.equal(one[name], start[name]) for name in start if name.endswith("conv1.weight"))


def test_freezing_stops_statistics_and_ranges(prepared: Prepared) -> None:
    prepared.calibrate([images()])
    prepared.freeze_batchnorm()
    prepared.freeze_observers()
    prepared.train()
    kept = {name: value.clone() for name, value in prepared.state_dict().items() if "running" in name or "min_val" in name}
    prepared(images() * 3)
    after = prepared.state_dict()
    assert all(torch.equal(after[name], value) for name, value in kept.items())


def test_batchnorm_options_survive_preparation(prepared_once: dict[str, Prepared]) -> None:
    made, prepared = plain(), copy.deepcopy(prepared_once["plain"])
    for site in prepared.fake_quantizers():
        site.disable_fake_quant()
    made.train()
    with torch.no_grad():
        torch.manual_seed(3)
        prepared(images())
        torch.manual_seed(3)
        made(images())
        for name in ("body.norm.running_mean", "body.norm.running_var"):
            torch.testing.assert_close(prepared.graph_module.state_dict()[name], made.state_dict()[name], rtol=1e-4, atol=1e-5)
        prepared.eval(), made.eval()
        torch.testing.assert_close(prepared(images()), made(images()), rtol=1e-4, atol=1e-5)


def test_mse_observer_clips_outliers_and_sees_every_column() -> None:
    observer = MeanSquaredErrorObserver(dtype=torch.int8, quant_min=-128, quant_max=127, qscheme=torch.per_tensor_symmetric, averaging_constant=1.0)
    values = torch.zeros(64, 8, 32, 32)
    values[..., 16] = torch.randn(64, 8, 32, generator=torch.Generator().manual_seed(0))
    values[0, 0, 0, 16] = 60.0
    observer(values)
    assert 2 < float(observer.max_val) < 30


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "found none"),
        ([torch.full((1, 3, 16, 16), 0.3)], "found one, which is constant"),
        ([torch.rand(1, 3, 16, 16).repeat(4, 1, 1, 1)], "found 4 that are all the same"),
        ([torch.linspace(0, 1, 768).reshape(1, 3, 16, 16)] * 2, "found 2 that are all the same"),
        ([torch.rand(4, 3, 16, 16).index_fill(0, torch.tensor([1]), float("nan"))], "NaN"),
    ],
)
def test_bad_calibration_images_are_refused(batches: list[Tensor], message: str, prepared: Prepared) -> None:
    with pytest.raises(StageFailed, match=message):
        prepared.calibrate(batches)


def test_dead_layer_has_no_scale(prepared: Prepared) -> None:
    nn.init.zeros_(prepared.graph_module.get_parameter("body.layer1.0.conv1.weight"))
    with pytest.raises(StageFailed, match=r"the weight of 'body\.layer1\.0\.conv1' is always zero"):
        prepared.calibrate([images()])


def test_dead_channel_takes_its_layers_largest_scale(prepared: Prepared) -> None:
    nn.init.zeros_(prepared.graph_module.get_parameter("body.layer1.0.conv1.weight")[2])
    made, _ = quantized(network(), prepared)
    scales = made.lineage[0]["sites"]["body.layer1.0.conv1"]["weight"]
    assert scales[2] == max(scales)


def test_a_tensor_too_small_for_a_scale_is_refused(prepared: Prepared) -> None:
    with torch.no_grad():
        prepared.graph_module.get_parameter("body.fc.weight").fill_(1e-40)
    with pytest.raises(StageFailed, match=r"the weight of 'body\.fc' never exceeds 1e-40, too little for a scale"):
        prepared.calibrate([images()])


def test_learned_scales_follow_the_gradient_of_lsq() -> None:
    site = SiteFakeQuantize(tensor="x", place="x", kind="activation", observer=MinMaxObserver, dtype=torch.int8, quant_min=-128, quant_max=127)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    site(x)
    site.learn()
    assert site.log_step is not None
    with torch.no_grad():
        site.log_step -= 0.7  # so that some values are clipped
    site(x).sum().backward()
    step = site.scale
    ratio = x / step
    inside = (ratio.round() >= -128) & (ratio.round() <= 127)
    wanted = torch.where(inside, ratio.round() - ratio, ratio.clamp(-128, 127)).sum() * (3 * 8 * 8 * 127) ** -0.5 / step
    assert inside.float().mean() < 1
    torch.testing.assert_close(site.log_step.grad, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("lr", [0.01, 1e6])
def test_learned_scales_stay_positive_and_are_written_back(lr: float, prepared: Prepared) -> None:
    made = network()
    prepared.calibrate([images()])
    before = prepared.sites()
    prepared.learn_scales()
    learned = [site for site in prepared.fake_quantizers() if site.log_step is not None]
    assert {site.kind for site in learned} == {"weight", "activation"}
    optimizer = torch.optim.SGD([site.log_step for site in learned if site.log_step is not None], lr)
    prepared.train()
    prepared(images()).square().mean().backward()
    optimizer.step()
    prepared.write_back(made)
    sites = made.lineage[0]["sites"]
    replay(made, made.lineage[0])
    assert sites["body.conv1"]["input"] != before["body.conv1"]["input"]
    assert sites["body.layer1.0.conv2"]["weight"] != before["body.layer1.0.conv2"]["weight"]
    if lr < 1:
        with torch.no_grad():
            trained = prepared.eval()(images())
            assert (fake_quantized(made)(images()) - trained).abs().max() < 0.1 * trained.abs().max() + 1e-3


class Unreached(nn.Module):
    """Has a layer that its forward pass never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.unused, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.a(x)).mean((2, 3)))


def test_a_layer_that_is_never_reached_has_no_scales_and_keeps_its_weights() -> None:
    torch.manual_seed(0)
    made = Network(Unreached(), {"arch": "unreached", "outputs": 10}, PREPROCESSING).eval()
    kept = made.get_parameter("body.unused.weight").clone()
    quantized(made)
    assert set(made.lineage[0]["sites"]) == {"body.a", "body.head"}
    assert torch.equal(made.get_parameter("body.unused.weight"), kept)
    assert fake_quantized(made)(images()).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sites: sites.update({"body.nowhere": {"weight": [1.0]}}), "lacks"),
        (lambda sites: sites["body.conv1"].update(weight=[1.0]), "weight scales"),
        (lambda sites: sites["body.conv1"].update(input=0.0), "not a positive number"),
        (lambda sites: sites["body.conv1"].update(input=1e-40), "denormal"),
    ],
)
def test_replay_refuses_sites_that_do_not_fit(change: object, message: str, quantized_once: dict[str, tuple[Network, Prepared]]) -> None:
    made, entry = quantized_once["network"][0], copy.deepcopy(quantized_once["network"][0].lineage[0])
    change(entry["sites"])  # type: ignore[operator]
    with pytest.raises(ArtifactMismatch, match=message):
        replay(made, entry)


def test_resnet18_exports_tensorrts_placement() -> None:
    made, _ = quantized(network("resnet18", stem="small"))
    model = canonical(deployed(made), made, recorded_scales(made))
    counts = Counter(node.op_type for node in model.graph.node)
    assert {k: counts[k] for k in ("QuantizeLinear", "DequantizeLinear", "Conv", "Add", "Relu", "GlobalAveragePool")} == {
        "QuantizeLinear": 21,
        "DequantizeLinear": 42,
        "Conv": 20,
        "Add": 8,
        "Relu": 17,
        "GlobalAveragePool": 1,
    }
    names = {initializer.name for initializer in model.graph.initializer}
    assert {"body.layer1.0.conv1.weight", "body.layer1.0.conv1.bias", "body.fc.weight"} <= names


@pytest.fixture(scope="module")
def deployed_plain(quantized_once: dict[str, tuple[Network, Prepared]]) -> nn.Module:
    return deployed(quantized_once["plain"][0])


@pytest.mark.parametrize("opset", [19, 20, 21, 22, 23])
def test_every_allowed_opset_runs_with_any_batch(opset: int, deployed_plain: nn.Module, tmp_path: object) -> None:
    from deployopt.runtime.onnxruntime_session import open_unoptimized

    module = deployed_plain
    path = tmp_path / "model.onnx"  # type: ignore[operator]
    path.write_bytes(to_onnx(module, example_input(PREPROCESSING), opset).SerializeToString())
    with open_unoptimized(path) as session, torch.no_grad():
        for count in (1, 2, 7):
            found = session.infer({"input": images(count).numpy()})["output"]
            np.testing.assert_allclose(found, module(images(count)).numpy(), atol=0.05)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        print("the network's own note", file=sys.stderr)
        if x.sum().item() > 0:
            x = x * 2
        return self.head(x.mean((2, 3)))


class OneBatch(nn.Module):
    """Works for two images only, or makes other operations of another number; torch.export itself names no line."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.head = way, nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        if self.way == "shaped":
            x = x.reshape(2, 3)
        elif self.way == "branched":
            x = x * 2 if len(x) == 2 else x
        else:
            x = torch.stack([row * 2 for row in x])
        return self.head(x)


@pytest.mark.parametrize(("way", "line"), [("shaped", "x.reshape(2, 3)"), ("branched", "x * 2 if"), ("looped", "for row in x")])
def test_a_network_of_one_batch_size_names_the_line_that_fixes_it(way: str, line: str) -> None:
    found = rf"cannot trace the network at test_quantizer\.py:\d+ in forward: `.*{re.escape(line)}.*`: the line fits one batch size only"
    with pytest.raises(ExportFailed, match=found):
        deployed(Network(OneBatch(way), {"arch": "one", "outputs": 10}, PREPROCESSING))


@pytest.mark.parametrize(("where", "inside"), [("torch/nn/functional.py", True), ("torchvision/models/resnet.py", False), ("torch_ours/net.py", False)])
def test_only_pytorchs_own_folder_is_pytorch(where: str, inside: bool) -> None:
    assert _inside(str(Path("lib") / where), Path("lib") / "torch") is inside


def test_untraceable_network_names_the_line_and_prints_no_graph(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExportFailed, match=r"test_quantizer\.py:\d+ in forward: `if x\.sum\(\)\.item\(\) > 0:`"):
        deployed(Network(Branching(), {"arch": "branching", "outputs": 10}, PREPROCESSING))
    assert set(capsys.readouterr().err.splitlines()) == {"the network's own note"}
