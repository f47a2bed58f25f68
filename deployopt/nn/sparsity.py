"""Group-sparse training: channels that will be cut are trained towards zero first, all coupled weights of a channel together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deployopt.nn.pruning import Group, Slice


class _Coupled(NamedTuple):
    """Part of one weight: entry `indices[i]` of dimension `dim` belongs to channel `channels[i]` of the group."""

    weight: nn.Parameter
    dim: int
    indices: Tensor  # int64 [n]
    channels: Tensor  # int64 [n]


class GroupSparsity:
    """Adds the gradient of DepGraph's group regulariser to a network's weights (https://arxiv.org/abs/2301.12900, section 3.2, equations 5 and 6).

    The regulariser is Σ over groups and channels k of γ_k · I_k, where I_k is the squared norm of all weights coupled to channel k and
    γ_k = 2^(alpha · (max I − I_k) / (max I − min I)), with I's square root in the exponent as in the authors' code: the least important channel is pulled
    2^alpha times as hard as the most important one. As there, `strength` counts the factor 2 of the gradient.

    Args:
        module: the network, on the device it is trained on.
        groups: of `pruning.survey(module)`.
        strength: λ, by which the gradient is multiplied.
        alpha: how much more the unimportant channels shrink.
    """

    def __init__(self, module: nn.Module, groups: Sequence[Group], strength: float, alpha: float) -> None:
        self._groups = [(g.size, coupled) for g in groups if (coupled := [c for s in g.slices if (c := _coupled(module, s, g.size)) is not None])]
        self._strength, self._alpha = strength, alpha

    @torch.no_grad()
    def __call__(self) -> None:
        """Add to the gradients that are there. Call between `backward` and the optimizer's step."""
        for size, coupled in self._groups:
            norms = _norms(size, coupled)
            spread = (norms.max() - norms.min()).clamp_min(torch.finfo(norms.dtype).tiny)
            pull = self._strength * 2 ** (self._alpha * (norms.max() - norms) / spread)  # [size]
            for part in coupled:
                if part.weight.grad is not None:
                    taken = part.weight.index_select(part.dim, part.indices)
                    part.weight.grad.index_add_(part.dim, part.indices, taken * _along(pull[part.channels], part.dim, taken.ndim))


@torch.no_grad()
def small_share(module: nn.Module, groups: Sequence[Group], below: float = 0.01) -> float:
    """The share of channels whose coupled weights have a norm under `below` times that of their group's largest."""
    coupled = [(g.size, [c for s in g.slices if (c := _coupled(module, s, g.size)) is not None]) for g in groups]
    norms = [_norms(size, parts) for size, parts in coupled if parts]
    return sum(int((n < below * n.max()).sum()) for n in norms) / sum(len(n) for n in norms)


def _norms(size: int, coupled: Sequence[_Coupled]) -> Tensor:
    """sqrt(I): float32 [size]."""
    squares = torch.zeros(size, device=coupled[0].weight.device)
    for part in coupled:
        taken = part.weight.index_select(part.dim, part.indices).movedim(part.dim, 0)
        squares.index_add_(0, part.channels, taken.reshape(len(part.indices), -1).square().sum(1))
    return squares.sqrt()


def _along(values: Tensor, dim: int, ndim: int) -> Tensor:
    """[n] as [1, …, n, …, 1], with n at `dim`."""
    return values.view([-1 if d == dim else 1 for d in range(ndim)])


def _coupled(module: nn.Module, found: Slice, size: int) -> _Coupled | None:
    """The weight that a slice cuts; None for a module without one, and for the inputs of a grouped convolution, whose weight has no axis for them."""
    owner = module.get_submodule(found.module)
    weight = getattr(owner, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return None
    transposed = isinstance(owner, nn.ConvTranspose2d)
    dim = 0 if weight.ndim == 1 or (found.direction == "out") != transposed else 1
    if dim == 1 and getattr(owner, "groups", 1) > 1:
        return None
    rooted = found.roots >= 0
    indices = torch.as_tensor(found.indices[rooted], device=weight.device)
    return _Coupled(weight, dim, indices, torch.as_tensor(found.roots[rooted] % size, device=weight.device))
