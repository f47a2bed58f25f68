from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deployopt.nn import weight_gradient
from deployopt.nn.weight_gradient import MOST_POSITIONS, SmallMapGradients

OURS = "_SmallMapBackward"


def gradients(convolution: nn.Conv2d, images: Tensor, ours: bool) -> tuple[Tensor, dict[str, Tensor | None], str]:
    """Its output, the gradients of images and parameters, and what computes them."""
    convolution.zero_grad()
    images = images.clone().requires_grad_()
    with SmallMapGradients() if ours else torch.enable_grad():
        output = convolution(images)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    (output * weights).sum().backward()
    assert output.grad_fn is not None
    return output.detach(), {"images": images.grad, **{n: p.grad for n, p in convolution.named_parameters()}}, output.grad_fn.name()


def assert_same(convolution: nn.Conv2d, images: Tensor) -> str:
    """Both ways give the same; returns what computed ours."""
    output, found, name = gradients(convolution, images, ours=True)
    wanted_output, wanted, _ = gradients(convolution, images, ours=False)
    torch.testing.assert_close(output, wanted_output)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    return name


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 1), st.integers(0, 2)),
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    bias=st.booleans(),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_same_gradients_as_pytorch(
    height: int, width: int, kernel: Any, stride: Any, padding: Any, channels: tuple[int, int], bias: bool, layout: torch.memory_format
) -> None:
    assume(layout is torch.contiguous_format or kernel != (1, 1) or channels[0] >= 8)  # where PyTorch's own gradient corrupts memory: `memory_layout`
    torch.manual_seed(0)
    height, width = max(height, kernel[0] - 2 * padding[0]), max(width, kernel[1] - 2 * padding[1])
    convolution = nn.Conv2d(*channels, kernel, stride, padding, bias=bias).to(memory_format=layout)
    images = torch.randn(3, channels[0], height, width).to(memory_format=layout)
    positions = convolution(images).shape[2:].numel()
    assert (assert_same(convolution, images) == OURS) is (positions <= MOST_POSITIONS)


@pytest.mark.parametrize(
    "convolution",
    [
        pytest.param(nn.Conv2d(4, 4, 3, padding=1, groups=4), id="depthwise"),
        pytest.param(nn.Conv2d(4, 4, 3, padding=2, dilation=2), id="dilated"),
        pytest.param(nn.Conv2d(4, 4, 3, padding="same"), id="padding by name"),
    ],
)
def test_leaves_other_convolutions_to_pytorch(convolution: nn.Conv2d) -> None:
    assert assert_same(convolution, torch.randn(2, 4, 3, 3)) != OURS


def test_frozen_weights_get_no_gradient() -> None:
    convolution = nn.Conv2d(4, 4, 3, padding=1)
    convolution.weight.requires_grad_(False)
    assert assert_same(convolution, torch.randn(2, 4, 3, 3)) != OURS
    assert convolution.weight.grad is None
    assert convolution.bias is not None
    assert convolution.bias.grad is not None


@pytest.mark.parametrize(
    ("images", "call", "ours"),
    [
        pytest.param(torch.randn(2, 4, 3, 3), {"padding": 1}, True, id="keywords"),
        pytest.param(torch.randn(2, 4, 3, 3), {"padding": np.int64(1), "stride": np.int64(2)}, True, id="integers of NumPy"),
        pytest.param(torch.randn(4, 3, 3), {"padding": 1}, False, id="one image without a batch axis"),
        pytest.param(torch.randn(2, 4, 3, 3).double(), {}, False, id="other types"),
    ],
)
def test_calls_as_pytorch_takes_them(images: Tensor, call: dict[str, Any], ours: bool) -> None:
    weight = torch.randn(5, 4, 3, 3, dtype=images.dtype, requires_grad=True)
    plain = {name: int(value) for name, value in call.items()}
    (wanted,) = torch.autograd.grad(F.conv2d(images, weight, **plain).square().sum(), weight)
    with SmallMapGradients():
        output = F.conv2d(images, weight, **call)
    assert output.grad_fn is not None
    assert (output.grad_fn.name() == OURS) is ours
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), weight)[0], wanted, rtol=1e-4, atol=1e-4)


def test_leaves_autocast_to_pytorch() -> None:
    convolution = nn.Conv2d(4, 4, 3, padding=1)
    with SmallMapGradients(), torch.autocast("cpu", torch.bfloat16):
        output = convolution(torch.randn(2, 4, 3, 3))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert convolution.weight.grad is not None


def test_large_products_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    convolution, images = nn.Conv2d(4, 4, 3, padding=1), torch.randn(2, 4, 3, 3)
    monkeypatch.setattr(weight_gradient, "MOST_NUMBERS", 2 * 9 * 36)
    assert assert_same(convolution, images) == OURS
    monkeypatch.setattr(weight_gradient, "MOST_NUMBERS", 2 * 9 * 36 - 1)
    assert assert_same(convolution, images) != OURS


def test_a_first_layer_of_which_no_gradient_of_images_is_asked() -> None:
    convolution, images = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5)
    with SmallMapGradients():
        convolution(images).square().sum().backward()
    found = [p.grad for p in convolution.parameters()]
    wanted = torch.autograd.grad(convolution(images).square().sum(), list(convolution.parameters()))
    torch.testing.assert_close(found, list(wanted), rtol=1e-4, atol=1e-4)


def test_sees_the_convolutions_of_an_exported_graph() -> None:
    images = torch.randn(2, 4, 3, 3)
    graph = torch.export.export(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()), (images,)).module()
    with SmallMapGradients():
        output = graph(images)
    (before,) = (function for function, _ in output.grad_fn.next_functions if function is not None)
    assert before.name() == OURS


def test_ends_with_its_context() -> None:
    convolution = nn.Conv2d(4, 4, 1)
    with SmallMapGradients():
        pass
    output = convolution(torch.randn(2, 4, 2, 2))
    assert output.grad_fn is not None
    assert output.grad_fn.name() != OURS
