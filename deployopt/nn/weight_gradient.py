"""Weight gradients of convolutions over small maps, as one matrix product: the deep layers of a ResNet on small images train several times faster on CPUs.

oneDNN's kernel goes through a batch image by image and adds to the whole weight gradient each time, so where an image has a few positions only, it reads
and writes megabytes for each of them. One product over the positions of all images reads the weights once: 2–13 times as fast at 1×1 and 2×2 positions,
1.1–1.9 times at 4×4, hardly or not from 8×8 on (`MOST_POSITIONS`; 3×3 kernels of 64 to 512 channels, two threads, PyTorch 2.15 on AVX2). A step of ResNet-18
on images of 32 pixels is 1.85 times as fast, with a stem for small images 1.28 times (benchmarks/train_step.py).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

MOST_POSITIONS = 16  # of the output, an image
MOST_NUMBERS = 1 << 26  # in the product's left side, a copy of what the kernel sees at each position: 256 MB

_CONVOLUTIONS = (F.conv2d, torch.ops.aten.conv2d.default)  # as modules and as exported graphs call it


class SmallMapGradients(TorchFunctionMode):
    """While this context is entered, convolutions on CPU take their weight gradient in the faster of the two ways. What they compute is the same."""

    def __torch_function__(self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        output = _over_small_map(*args, **kwargs) if func in _CONVOLUTIONS else None
        return func(*args, **kwargs) if output is None else output


def _over_small_map(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    """conv2d, where the product is the faster way to its weight gradient and fits."""
    if groups != 1 or isinstance(padding, str) or _pair(dilation) != [1, 1] or input.ndim != 4:
        return None
    if not weight.requires_grad or weight.device.type != "cpu" or not input.dtype == weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
        return None
    stride, padding = _pair(stride), _pair(padding)
    height, width = ((n + 2 * p - k) // s + 1 for n, p, k, s in zip(input.shape[2:], padding, weight.shape[2:], stride, strict=True))
    seen = input.shape[0] * height * width * weight[0].numel()
    if height * width > MOST_POSITIONS or seen > MOST_NUMBERS:
        return None
    output: Tensor = _SmallMap.apply(input, weight, bias, stride, padding)
    return output


def _pair(value: Any) -> list[int]:
    try:
        return [operator.index(value)] * 2
    except TypeError:
        return list(value) * (2 // len(value))


class _SmallMap(torch.autograd.Function):
    """torch.conv2d of one group without dilation, to be differentiated once; its input's gradient is PyTorch's own."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return torch.conv2d(images, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        images, weight = ctx.saved_tensors
        of_images, of_weight, of_bias = ctx.needs_input_grad[:3]
        return (
            _of_images(gradient, images, weight, ctx.stride, ctx.padding) if of_images else None,
            _of_weight(gradient, images, weight, ctx.stride, ctx.padding) if of_weight else None,
            gradient.sum((0, 2, 3)) if of_bias else None,  # asked of oneDNN, it would compute the weights' too
            None,
            None,
        )


def _of_images(gradient: Tensor, images: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    mask = [True, False, False]
    found: Tensor = torch.ops.aten.convolution_backward(gradient, images, weight, None, stride, padding, [1, 1], False, [0, 0], 1, mask)[0]
    return found


def _of_weight(gradient: Tensor, images: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """[O, C, kh, kw] in channels last: gradientᵀ [O, N·H·W] times what the kernel saw at each position, [N·H·W, kh·kw·C]."""
    channels_out, channels_in, height, width = weight.shape
    seen = images.permute(0, 2, 3, 1)
    if any(padding):
        seen = F.pad(seen, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    seen = seen.unfold(1, height, stride[0]).unfold(2, width, stride[1])  # [N, H, W, C, kh, kw]
    columns = seen.permute(0, 1, 2, 4, 5, 3).reshape(-1, height * width * channels_in)
    product = gradient.permute(0, 2, 3, 1).reshape(-1, channels_out).t() @ columns
    return product.view(channels_out, height, width, channels_in).permute(0, 3, 1, 2)
