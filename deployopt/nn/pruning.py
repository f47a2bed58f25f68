"""Structured pruning over Torch-Pruning's dependency graph (Fang et al., "DepGraph", https://arxiv.org/abs/2301.12900).

The graph is asked once, on a throw-away copy, which slices of which modules fall together. What is then cut is plain data, the *history*
[[module, "out" | "in", [channel indices]], …], and `replay` is the only code that cuts: pruning now and rebuilding later are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from deployopt.data import Dataset
from deployopt.errors import ArtifactMismatch, PruningImpossible
from deployopt.nn import losses, macs
from deployopt.nn.models import Network
from deployopt.runtime.preprocessing import to_feed
from deployopt.runtime.progress import Progress, SilentProgress
from deployopt.tasks import Task

Criterion = Literal["group_magnitude", "group_magnitude_l1", "taylor", "bn_scale"]
Metric = Literal["macs", "params"]
History = list[list[Any]]
Backward = Callable[[nn.Module], None]
BISECTIONS = 20


@dataclass(frozen=True)
class _Slice:
    """Channels of one module and direction; `roots[i]` is the group channel that `indices[i]` falls with."""

    module: str
    direction: Literal["out", "in"]
    indices: tuple[int, ...]
    roots: tuple[int | None, ...]


@dataclass(frozen=True)
class _Group:
    """Channels that only fall together: one score each, over all coupled modules.

    A grouped convolution loses the same channels in each of its `blocks`; scores are then averaged over blocks and `size` counts one block.
    """

    name: str
    blocks: int
    scores: Tensor  # float32 [size]
    slices: tuple[_Slice, ...]

    @property
    def size(self) -> int:
        return len(self.scores)

    def history(self, kept: int) -> History:
        """What to cut to keep the `kept` highest scores of each block."""
        cut = torch.argsort(self.scores, stable=True)[: self.size - kept].tolist()
        roots = {channel + block * self.size for channel in cut for block in range(self.blocks)}
        rows = [[s.module, s.direction, sorted(i for i, r in zip(s.indices, s.roots, strict=True) if r in roots)] for s in self.slices]
        return [row for row in rows if row[2]]


def prune(
    network: Network,
    at_most: int,
    *,
    metric: Metric = "macs",
    criterion: Criterion = "group_magnitude",
    across_layers: bool = False,
    round_to: int = 1,
    max_layer_ratio: float = 0.9,
    backward: Backward | None = None,
    progress: Progress | None = None,
) -> History:
    """Cut `network` in place until it has at most `at_most` MACs or parameters, and as close to that as its layers allow.

    Mode, hooks and `requires_grad` are left as found; the layers that make the outputs keep their width. The cut is appended to
    `network.lineage`.

    Args:
        criterion: "group_magnitude" (L2) or "group_magnitude_l1": norm of all coupled weights; "taylor": first-order change of the loss
            (https://arxiv.org/abs/1906.10771); "bn_scale": |γ| of BatchNorm (https://arxiv.org/abs/1708.06519), groups without one stay whole.
        across_layers: rank all layers' channels together; else each layer loses the same share.
        round_to: keep a multiple of this many channels (where a layer has as many).
        max_layer_ratio: no layer loses a larger share.
        backward: fills the gradients of the module it is given; "taylor" needs it (`gradients` makes one).

    Raises:
        PruningImpossible: no cut reaches the target (says the best), or scores are not finite.
    """
    progress = progress or SilentProgress()
    with progress.track(f"score channels by {criterion}", None):
        groups = _groups(network, criterion, backward)
    if not groups:
        raise PruningImpossible(f"{network.base['arch']} has no channels that could be cut by the criterion {criterion}", "choose another importance")
    shadow = macs.on_meta(network)

    def cost(kept: Sequence[int]) -> int:
        candidate = copy.deepcopy(shadow)
        replay(candidate, _join(groups, kept))
        return macs.count_on_meta(candidate, network.input_shape)[0 if metric == "params" else 1]

    def keep(ratio: float) -> list[int]:
        return _kept(groups, ratio, across_layers, round_to, max_layer_ratio)

    smallest = cost(keep(1.0))
    if smallest > at_most:
        whole = cost(keep(0.0))
        raise PruningImpossible(
            f"wanted at most {at_most:,} {metric} ({at_most / whole:.3f} of {whole:,}); with max_layer_ratio {max_layer_ratio:g} and "
            f"round_to {round_to} the best reached is {smallest:,} ({smallest / whole:.3f})",
            "raise prune.target, raise prune.max_layer_ratio, or lower prune.round_to",
        )
    with progress.track(f"search for {at_most:,} {metric}", 1 + BISECTIONS + len(groups)) as bar:

        def tried(kept: Sequence[int]) -> int:
            bar.advance()
            return cost(kept)

        history = _join(groups, _closest(groups, keep, tried, at_most))
    replay(network, history)
    network.lineage.append({"op": "prune", "history": history})
    return history


def replay(network: nn.Module, history: Sequence[Sequence[Any]]) -> None:
    """Cut exactly what `history` says. Works on weights and on shapes alone (meta tensors).

    Raises:
        ArtifactMismatch: a module or channel that this network has not.
    """
    graph = tp.DependencyGraph()
    # looked up before the first cut: a grouped convolution cut to one channel a group would pass for a depthwise one
    pruners = {name: graph.get_pruner_of_module(module) for name, module in network.named_modules()}
    for name, direction, indices in history:
        try:
            module = network.get_submodule(name)
        except AttributeError as exc:
            raise ArtifactMismatch(f"pruning history names the module {name}, which this network has not") from exc
        pruner = pruners[name]
        width = pruner.get_out_channels(module) if direction == "out" else pruner.get_in_channels(module)
        if not 0 <= min(indices) <= max(indices) < width or len(set(indices)) == width:
            raise ArtifactMismatch(f"pruning history cuts {len(indices)} channels up to {max(indices)} of {name}, which has {width}")
        trained = {key: parameter.requires_grad for key, parameter in module.named_parameters(recurse=False)}
        (pruner.prune_out_channels if direction == "out" else pruner.prune_in_channels)(module, list(indices))
        for key, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(trained[key])


def gradients(dataset: Dataset, task: Task, samples: int, seed: int, batch_size: int = 64) -> Backward:
    """For "taylor": accumulates the gradient of the loss over `samples` training images into the module it is given."""

    def backward(module: nn.Module) -> None:
        loss = losses.by_name(task.loss)
        chosen = np.random.Generator(np.random.PCG64(seed)).permutation(len(dataset.train))[:samples]
        device = next(module.parameters()).device
        for start in range(0, len(chosen), batch_size):
            rows = chosen[start : start + batch_size]
            feed = torch.from_numpy(to_feed(dataset.train.images(rows))).to(device)
            loss(module(feed), torch.from_numpy(dataset.train.targets[rows]).to(device)).backward()  # type: ignore[no-untyped-call]

    return backward


def _groups(network: Network, criterion: Criterion, backward: Backward | None) -> list[_Group]:
    """Every group that may be cut, scored. All tracing is done on a copy: Torch-Pruning switches modes and needs gradients."""
    probe = copy.deepcopy(network).cpu().eval().requires_grad_(True)
    graph = tp.DependencyGraph().build_dependency(probe, example_inputs=torch.rand(1, *network.input_shape))
    probe.zero_grad()
    if criterion == "taylor":
        if backward is None:
            raise ValueError("taylor needs `backward`")
        backward(probe)
    importance = _importance(criterion)
    names = {module: name for name, module in probe.named_modules()}
    groups = []
    for members in graph.get_all_groups(ignored_layers=[], root_module_types=(nn.Conv2d, nn.Linear)):
        scores = importance(members)
        if scores is not None:
            groups.append(_group(members, scores, names, graph))
    shadow = macs.on_meta(probe)
    width = _output_shape(shadow, network.input_shape)
    return [g for g in groups if g.size > 1 and _output_shape(_cut(shadow, g.history(g.size - 1)), network.input_shape) == width]


def _importance(criterion: Criterion) -> Callable[[Any], Tensor | None]:
    scorers: dict[str, Callable[[], Any]] = {
        "group_magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "group_magnitude_l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "taylor": tp.importance.GroupTaylorImportance,
        "bn_scale": tp.importance.BNScaleImportance,
    }
    scorer: Callable[[Any], Tensor | None] = scorers[criterion]()
    return scorer


def _group(members: Any, scores: Tensor, names: dict[nn.Module, str], graph: Any) -> _Group:
    slices = []
    blocks = 1
    for position, (dependency, indices) in enumerate(members):
        module = dependency.target.module
        if isinstance(module, nn.Parameter):
            raise PruningImpossible(
                f"a free nn.Parameter of shape {list(module.shape)} is coupled to {names[members[0].dep.target.module]}; only channels of modules can be cut",
                "put it into a module, or leave prune out",
            )
        if module not in names:  # additions, reshapes, concatenations: nothing to cut
            continue
        if isinstance(module, nn.Conv2d) and 1 < module.groups < module.out_channels:
            blocks = max(blocks, module.groups)
        direction: Literal["out", "in"] = "out" if graph.is_out_channel_pruning_fn(dependency.handler) else "in"
        slices.append(_Slice(names[module], direction, tuple(indices), tuple(members[position].root_idxs)))
    name = slices[0].module
    if not torch.isfinite(scores).all():
        raise PruningImpossible(f"the importance of {name}'s channels is not finite: its weights or gradients are NaN or infinite", "train with a lower lr")
    return _Group(name, blocks, scores.detach().float().cpu().view(blocks, -1).mean(0), tuple(slices))


def _cut(shadow: nn.Module, history: History) -> nn.Module:
    candidate = copy.deepcopy(shadow)
    replay(candidate, history)
    return candidate


def _output_shape(shadow: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(shadow(torch.empty(1, *input_shape, device="meta")).shape)


def _join(groups: Sequence[_Group], kept: Sequence[int]) -> History:
    return [row for group, count in zip(groups, kept, strict=True) for row in group.history(count)]


def _kept(groups: Sequence[_Group], ratio: float, across_layers: bool, round_to: int, max_layer_ratio: float) -> list[int]:
    """Channels each group keeps when `ratio` of them are to go."""
    if across_layers:
        ranked = torch.sort(torch.cat([g.scores for g in groups])).values
        threshold = ranked[min(int(ratio * len(ranked)), len(ranked) - 1)]
        wanted = [int((g.scores >= threshold).sum()) for g in groups]
    else:
        wanted = [g.size - int(g.size * ratio) for g in groups]
    counts = []
    for group, want in zip(groups, wanted, strict=True):
        at_least = max(1, group.size - int(group.size * max_layer_ratio), want)
        counts.append(min(group.size, -(-at_least // round_to) * round_to))
    return counts


def _closest(groups: Sequence[_Group], keep: Callable[[float], list[int]], cost: Callable[[Sequence[int]], int], at_most: int) -> list[int]:
    """Bisect the ratio; then, since layers of one width step together, give channels back layer by layer while the target holds."""
    low, high = 0.0, 1.0
    if cost(keep(low)) <= at_most:
        return keep(low)
    for _ in range(BISECTIONS):
        if keep(low) == keep(high):
            break
        middle = (low + high) / 2
        low, high = (low, middle) if cost(keep(middle)) <= at_most else (middle, high)
    chosen, larger = keep(high), keep(low)
    gains = [float(g.scores.sort().values[g.size - count]) for g, count in zip(groups, larger, strict=True)]  # the best channel to get back
    for position in sorted(range(len(groups)), key=lambda p: -gains[p]):
        trial = [*chosen[:position], larger[position], *chosen[position + 1 :]]
        if trial != chosen and cost(trial) <= at_most:
            chosen = trial
    return chosen
