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
    shadow = on_meta(network)
    macs = 0

    def add(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal macs
        weight = module.weight
        assert isinstance(weight, Tensor)
        per_output = weight[0].numel() if not isinstance(module, nn.ConvTranspose2d) else weight.numel() // output.shape[1]
        macs += output.numel() * per_output

    for module in shadow.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)):
            module.register_forward_hook(add)
    with torch.no_grad():
        shadow(torch.empty(1, *input_shape, device="meta"))
    return sum(math.prod(p.shape) for p in network.parameters()), macs


def on_meta(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode without storage: forward only computes shapes."""
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        shadow = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(shadow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shadow
    return copy.deepcopy(network, memo).eval()  # the memo makes deepcopy take the shadows instead of copying weights
