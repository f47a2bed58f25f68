"""Parametrised tensors (`torch.nn.utils.parametrizations`: weight_norm, spectral_norm, orthogonal …), which are computed from others at each use.

They are trained as they are. Cutting, quantising and exporting need the tensors themselves, which then take the place of what they were computed from.
A network that lost them so says it in its lineage: {"op": "remove_parametrizations", "modules": ["body.conv1", …]}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from deployopt.errors import ArtifactMismatch, UsageError

if TYPE_CHECKING:
    from deployopt.nn.models import Network

HOOKS = (WeightNorm, SpectralNorm)


def modules(network: nn.Module) -> list[str]:
    """Paths of the modules that have parametrised tensors."""
    return [name for name, module in network.named_modules() if parametrize.is_parametrized(module)]


def remove(network: Network) -> list[str]:
    """Replace, in place, each parametrised tensor by its value in evaluation mode, and add that to the lineage; returns the modules' paths."""
    found = modules(network)
    if found:
        replay(network, found)
        network.lineage.append({"op": "remove_parametrizations", "modules": found})
    return found


@torch.no_grad()
def replay(network: nn.Module, names: Sequence[str]) -> None:
    """As `remove`, of the modules named; without a lineage. Copies of the network keep theirs.

    `torch.nn.utils.parametrize.remove_parametrizations` deletes a property of a class that copies share, and makes a buffer of a frozen weight.

    Raises:
        ArtifactMismatch: a module that this network has not, or whose tensors are not parametrised.
    """
    parametrized = set(modules(network))
    for name in names:
        if name not in parametrized:
            raise ArtifactMismatch(
                f"the lineage removes parametrisations of the module {name}, and this network has them at {', '.join(sorted(parametrized)) or 'none'}",
                "use the model's code of the run that made it",
            )
        module = network.get_submodule(name)
        lists = module.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        lists.eval()  # in training mode spectral_norm takes a step of its power iteration
        values = {tensor: (computed().clone(), list(computed.parameters(recurse=False))) for tensor, computed in lists.items()}
        original_class = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        module.__class__ = original_class
        for tensor, (value, originals) in values.items():
            if originals:
                module.register_parameter(tensor, nn.Parameter(value, any(p.requires_grad for p in originals)))
            else:
                module.register_buffer(tensor, value)


def check_hooks(network: nn.Module, arch: str) -> None:
    """Raise UsageError for weights that are computed by hooks, as before PyTorch had parametrisations: such a module cannot be copied."""
    for name, module in network.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, HOOKS):
                function = hook.__class__.__module__.rpartition(".")[2]
                raise UsageError(
                    f"{arch}: the {hook.name} of {name} is computed by a hook of torch.nn.utils.{function}, which PyTorch cannot copy",
                    f"apply torch.nn.utils.parametrizations.{function} instead",
                )
