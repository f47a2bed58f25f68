"""INT8 of networks that are no ResNets: joined feature maps, tensors read as they are and pooled, sums of activated tensors and of a result that two
of them read, transposed convolutions, nn.ReLU6 and Dropout2d, run by both CPU runtimes."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from small_networks import PREPROCESSING
from torch import Tensor, nn

from deployopt.backends import BuildRequest, onnxruntime, openvino, tensorrt_rtx
from deployopt.nn.capture import capture, example_input
from deployopt.nn.export import canonical
from deployopt.nn.models import Network
from deployopt.nn.placement import layers
from deployopt.nn.prepared import Prepared, Scheme
from deployopt.nn.quantizer import fake_quantized, recorded_scales
from deployopt.runtime.progress import SilentProgress
from deployopt.runtime.session import SessionOptions


class Block(nn.Module):
    """A stem, three convolutions that a subclass connects, and a head behind the mean."""

    def __init__(self, last: int = 16) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.last, self.head = nn.Conv2d(last, 16, 3, padding=1), nn.Linear(16, 7)

    def out(self, x: Tensor) -> Tensor:
        return self.head(self.last(x).relu().mean((2, 3)))  # type: ignore[no-any-return]


class Inception(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.out(F.max_pool2d(torch.cat([self.a(x).relu(), self.b(x).relu() * 0.25], 1), 2))


class Dense(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.out(torch.cat([x, self.a(x).relu(), self.b(x)], 1))


class UNet(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        small = F.max_pool2d(self.a(x).relu(), 2)
        return self.out(torch.cat([x, F.interpolate(small, scale_factor=2.0), self.b(x)], 1))


class Skip(Block):
    """A tensor that one convolution reads as it is and another pooled."""

    def __init__(self, last: int) -> None:
        super().__init__(last)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        small = self.norm(self.a(F.max_pool2d(x, 2))).relu()
        return self.out(torch.cat([self.b(x), F.interpolate(small, scale_factor=2.0)], 1))


class Pools(Block):
    """A tensor that two convolutions read, each pooled in another way."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.out(torch.cat([self.a(F.max_pool2d(x, 2)).relu(), self.b(F.max_pool2d(x, 3, 2, 1))], 1))


class Twice(Block):
    """A convolution whose result two Adds read, of sums that differ much in size."""

    def __init__(self, last: int) -> None:
        super().__init__(last)
        self.a = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        made = self.a(x)
        first = (made + x).relu()
        return self.out(self.b((made + 30 * first).relu()))


class Up(Block):
    """A transposed convolution, which stays in float."""

    def __init__(self, last: int) -> None:
        super().__init__(last)
        self.b = nn.ConvTranspose2d(8, 8, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.a(F.max_pool2d(self.stem(x).relu(), 2)).relu()))


class Sums(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.out(self.a(x).relu() + self.b(x).relu())


def quantized(body: nn.Module) -> tuple[Network, Prepared]:
    network = Network(body, {"arch": type(body).__name__, "outputs": 7}, PREPROCESSING).eval()
    prepared = Prepared(network, Scheme())
    prepared.calibrate([torch.rand(16, *network.input_shape) for _ in range(2)])
    prepared.write_back(network)
    return network, prepared


@pytest.mark.parametrize("backend", [onnxruntime, openvino], ids=["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("make", "last", "layers_in"),
    [
        (Inception, 16, {"int8": 5}),
        (Dense, 32, {"int8": 5}),
        (UNet, 32, {"int8": 5}),
        (Skip, 16, {"int8": 5}),
        (Pools, 16, {"int8": 5}),
        (Sums, 8, {"int8": 5}),
        (Twice, 8, {"int8": 5}),
        (Up, 8, {"int8": 4, "fp32": 1}),
    ],
)
def test_runtimes_compute_layers_in_int8_and_what_torch_does(make: type[Block], last: int, layers_in: dict[str, int], backend: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, _ = quantized(make(last))
    module = fake_quantized(network)
    onnx.save(canonical(module, network, recorded_scales(network)), tmp_path / "canonical.onnx")
    path = backend.prepare(tmp_path / "canonical.onnx", "int8", tmp_path / "prepared.onnx")
    assert backend.count_layers(str(path), "int8", SilentProgress()) == layers_in
    images = torch.rand(16, *network.input_shape)
    with torch.inference_mode(), backend.open(path, SessionOptions(precision="int8")) as session:
        wanted = module(images).numpy()
        (found,) = session.infer({"input": images.numpy()}).values()
    assert np.abs(found - wanted).max() < 0.03 * np.abs(wanted).max()


@pytest.mark.skipif(not tensorrt_rtx.probe().builds, reason="TensorRT-RTX is not installed")
@pytest.mark.parametrize(("make", "last", "layers_in"), [(Skip, 16, {"int8": 5}), (Up, 8, {"int8": 4, "fp32": 1})])
def test_tensorrt_rtx_builds_layers_in_int8(make: type[Block], last: int, layers_in: dict[str, int], tmp_path: Path) -> None:
    network, _ = quantized(make(last))
    onnx.save(canonical(fake_quantized(network), network, recorded_scales(network)), tmp_path / "canonical.onnx")
    path = tensorrt_rtx.prepare(tmp_path / "canonical.onnx", "int8", tmp_path / "prepared.onnx")
    artifact = tensorrt_rtx.build(path, tmp_path, BuildRequest("int8", (1,), 1, "cpu"), SilentProgress())
    assert artifact.metadata["verified"]["executed"] == layers_in


@pytest.mark.parametrize("make", [Skip, Pools])
def test_a_tensor_that_layers_read_pooled_and_not_has_one_scale(make: type[Block]) -> None:
    torch.manual_seed(0)
    network, prepared = quantized(make(16))
    sites = network.lineage[0]["sites"]
    assert sites["body.a"]["input"] == sites["body.b"]["input"] == sites["body.stem"]["output"]
    images = torch.rand(16, *network.input_shape)
    with torch.inference_mode():
        wanted = prepared(images)
        assert (fake_quantized(network)(images) - wanted).abs().max() < 0.01 * wanted.abs().max()


class Mobile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(inplace=True), nn.Dropout2d(0.5), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6())
        self.head = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))  # type: ignore[no-any-return]


def test_relu6_is_a_relu_and_dropout2d_drops_in_training_only() -> None:
    torch.manual_seed(0)
    network = Network(Mobile(), {"arch": "mobile", "outputs": 7}, PREPROCESSING).eval()
    found = layers(capture(network, example_input(PREPROCESSING)).graph)
    assert [layer.signed_input for layer in found] == [True, False, False]
    assert [str(layer.observed["output"].target) for layer in found[:2]] == ["aten.relu6.default"] * 2
    prepared, images = Prepared(network, Scheme()), torch.rand(4, *network.input_shape)
    prepared.calibrate([images])
    prepared.freeze_observers()
    assert torch.equal(prepared(images), prepared(images))
    prepared.train()
    assert not torch.equal(prepared(images), prepared(images))
