"""Parameters and multiply-accumulates of a network, counted on shapes alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn


def count(network: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, int]:
    """(parameters, MACs) of one image.

    A convolution has out_channels · H_out · W_out · (in_channels / groups) · kernel area MACs, a linear layer in · out per row.
    BatchNorm, activations, pooling and bias additions count nothing: BatchNorm is folded and the rest is not multiplication.

    Args:
        input_shape: [C, H, W].
    """
    return count_on_meta(on_meta(network), input_shape)


def count_on_meta(shadow: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, int]:
    """As `count`, of a network that `on_meta` made and that nobody needs afterwards."""
    macs = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        weight = module.weight
        assert isinstance(weight, Tensor)
        # weight is [out, in / groups, …], and [in, out / groups, …] where each input value is spread over the output
        macs += (inputs[0] if isinstance(module, nn.ConvTranspose2d) else output).numel() * weight[0].numel()

    for module in shadow.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)):
            module.register_forward_hook(add)
    with torch.no_grad():
        shadow(torch.empty(1, *input_shape, device="meta"))
    return sum(math.prod(p.shape) for p in shadow.parameters()), macs


def _same(x: Tensor) -> Tensor:
    return x


def on_meta(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode without storage: forward only computes shapes."""
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        shadow = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(shadow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shadow
    copied = copy.deepcopy(network, memo).eval()  # the memo makes deepcopy take the shadows instead of copying weights
    for module in copied.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            vars(module)["forward"] = _same  # keeps the shape; its own takes half of the time on meta
    return copied
