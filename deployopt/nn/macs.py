"""Parameters and multiply-accumulates of a network, counted on shapes alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

COUNTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)


def count(network: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, int]:
    """(parameters, MACs) of one image.

    A convolution has out_channels · H_out · W_out · (in_channels / groups) · kernel area MACs, a linear layer in · out per row.
    BatchNorm, activations, pooling and bias additions count nothing: BatchNorm is folded and the rest is not multiplication.

    Args:
        input_shape: [C, H, W].
    """
    return count_on_meta(on_meta(network), input_shape)


def count_on_meta(shadow: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, int]:
    """As `count`, of a network that `on_meta` made."""
    return sum(math.prod(p.shape) for p in shadow.parameters()), sum(by_module(shadow, input_shape).values())


def by_module(shadow: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """MACs of each convolution and linear layer, by module path, of a network that `on_meta` made."""
    found: dict[str, int] = {}

    def counter(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            # weight is [out, in / groups, …], and [in, out / groups, …] where each input value is spread over the output
            each = (inputs[0] if isinstance(module, nn.ConvTranspose2d) else output).numel() * weight[0].numel()
            found[name] = found.get(name, 0) + each

        return add

    handles = [m.register_forward_hook(counter(name)) for name, m in shadow.named_modules() if isinstance(m, COUNTED)]
    try:
        with torch.no_grad():
            shadow(torch.empty(1, *input_shape, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return found


def without_hooks(copied: nn.Module) -> nn.Module:
    """The same module, in place: its copied hooks would otherwise tell their owner of passes that are not the original's."""
    for module in copied.modules():
        for name, hooks in vars(module).items():
            if name.endswith("_hooks") and isinstance(hooks, dict):
                hooks.clear()
    return copied


def _same(x: Tensor) -> Tensor:
    return x


def on_meta(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode without storage or hooks: forward only computes shapes."""
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        shadow = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(shadow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shadow
    copied = without_hooks(copy.deepcopy(network, memo)).eval()  # the memo makes deepcopy take the shadows instead of copying weights
    for module in copied.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            vars(module)["forward"] = _same  # keeps the shape; its own takes half of the time on meta
    return copied
