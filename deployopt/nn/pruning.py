"""Structured pruning over Torch-Pruning's dependency graph (Fang et al., "DepGraph", https://arxiv.org/abs/2301.12900).

The graph is asked once, on a throw-away copy, which slices of which modules fall together. What is then cut is plain data, the *history*
[[module, "out" | "in", [channel indices]], …], and `replay` is the only code that cuts: pruning now and rebuilding later are the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import torch_pruning as tp
from numpy.typing import NDArray
from torch import Tensor, nn

from deployopt.data import Dataset
from deployopt.errors import ArtifactMismatch, PruningImpossible, UsageError
from deployopt.nn import losses, macs
from deployopt.nn.models import Network
from deployopt.runtime.preprocessing import to_feed
from deployopt.runtime.progress import Progress, SilentProgress
from deployopt.tasks import Task

Criterion = Literal["group_magnitude", "group_magnitude_l1", "taylor", "bn_scale"]
Normalizer = Literal["mean", "max"]
Metric = Literal["macs", "params"]
History = list[list[Any]]
Backward = Callable[[nn.Module], None]
Shares = Callable[[str, float], float]
BISECTIONS = 20
TAKEN_FOR_GRANTED = "the network's code takes their number for granted"


@dataclass(frozen=True)
class Rules:
    """What may be cut, and what goes first.

    Attributes:
        criterion: "group_magnitude" (L2) or "group_magnitude_l1": norm of all coupled weights; "taylor": first-order change of the loss
            (https://arxiv.org/abs/1906.10771); "bn_scale": |γ| of BatchNorm (https://arxiv.org/abs/1708.06519), groups without one stay whole.
        normalizer: scores of a group are divided by their mean or their maximum, which matters where groups are ranked together.
        across_layers: rank all layers' channels together; else each layer loses the same share.
            A group of zeros keeps them, and so ranks lowest.
        round_to: keep a multiple of this many channels (where a layer has as many).
        max_layer_ratio: no layer loses a larger share.
    """

    criterion: Criterion = "group_magnitude"
    normalizer: Normalizer = "mean"
    across_layers: bool = False
    round_to: int = 1
    max_layer_ratio: float = 0.9


@dataclass(frozen=True)
class Slice:
    """Channels of one module and direction: int64 [n]; `roots[i]` is the group channel that `indices[i]` falls with, -1 for none."""

    module: str
    direction: Literal["out", "in"]
    indices: NDArray[np.int64]
    roots: NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Channels that only fall together: one score each, over all coupled modules.

    A grouped convolution loses the same channels in each of its `blocks`; scores are then averaged over blocks and `size` counts one block.
    """

    name: str
    blocks: int
    scores: Tensor  # float32 [size]
    slices: tuple[Slice, ...]

    @property
    def size(self) -> int:
        return len(self.scores)

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """Channels from the least important: int64 [size]."""
        found: NDArray[np.int64] = torch.argsort(self.scores, stable=True).numpy()
        return found

    def history(self, kept: int) -> History:
        """What to cut to keep the `kept` highest scores of each block."""
        cut = np.zeros(self.blocks * self.size + 1, dtype=bool)  # the last: channels without a root stay
        cut[:-1].reshape(self.blocks, self.size)[:, self.order[: self.size - kept]] = True
        rows = ((s, s.indices[cut[s.roots]]) for s in self.slices)
        return [[s.module, s.direction, np.sort(indices).tolist()] for s, indices in rows if len(indices)]


@dataclass(frozen=True)
class Whole:
    """A group that keeps all its channels: its name as a `Group`'s, and why, in words."""

    name: str
    channels: int
    why: str


class Cuts:
    """Every way to cut one network by some rules: how many channels each group keeps, what that costs, and the history that does it.

    Attributes:
        groups: in the network's order; `kept` below is parallel to it.
        excluded: groups that no cut may touch. Those that make the outputs are in neither.
    """

    def __init__(self, network: Network, groups: Sequence[Group], excluded: Sequence[Whole], rules: Rules) -> None:
        self.groups = tuple(groups)
        self.excluded = tuple(excluded)
        self.rules = rules
        self._shares: Shares | None = None
        self._arch = network.base["arch"]
        self._costs = _Costs(macs.on_meta(network), network.input_shape)

    def with_rules(self, *, round_to: int) -> Cuts:
        """The same groups and scores under another alignment."""
        other = copy.copy(self)
        other.rules = Rules(**{**vars(self.rules), "round_to": round_to})
        return other

    def with_shares(self, shares: Shares) -> Cuts:
        """The same groups, of which a group loses `shares(name, ratio)` of its channels where it would lose `ratio`."""
        other = copy.copy(self)
        other._shares = shares
        return other

    def cost(self, kept: Sequence[int]) -> dict[Metric, int]:
        """{"params", "macs"} of the network that keeps so many channels."""
        params, multiply_accumulates = self._costs.after(self.history(kept))
        return {"params": params, "macs": multiply_accumulates}

    def history(self, kept: Sequence[int]) -> History:
        return _merged([row for group, count in zip(self.groups, kept, strict=True) for row in group.history(count)])

    @cached_property
    def _ranking(self) -> NDArray[np.int64]:
        """The group of each channel, of all groups from the least important channel: int64 [channels].

        Of equal scores those go first that come first in their own group's order, as a share of it: groups of equal scores lose equal shares.
        """
        groups = np.concatenate([np.full(g.size, position) for position, g in enumerate(self.groups)])
        scores = np.concatenate([g.scores.numpy()[g.order] for g in self.groups])
        ranks = np.concatenate([np.arange(g.size) / g.size for g in self.groups])
        return groups[np.lexsort((ranks, scores))]

    def kept(self, ratio: float) -> list[int]:
        """Channels each group keeps when `ratio` of them are to go."""
        if self.rules.across_layers:
            cut = np.bincount(self._ranking[: int(ratio * len(self._ranking))], minlength=len(self.groups))
            wanted = [g.size - int(count) for g, count in zip(self.groups, cut, strict=True)]
        else:
            wanted = [g.size - int(g.size * (ratio if self._shares is None else self._shares(g.name, ratio))) for g in self.groups]
        counts = []
        for group, want in zip(self.groups, wanted, strict=True):
            at_least = max(1, group.size - int(group.size * self.rules.max_layer_ratio), want)
            counts.append(min(group.size, -(-at_least // self.rules.round_to) * self.rules.round_to))
        return counts

    @property
    def smallest_macs(self) -> int:
        """Of the network that loses all it may."""
        return self.cost(self.kept(1.0))["macs"]

    def nearest(self, macs: int, progress: Progress | None = None) -> list[int]:
        """Channels to keep for about so many MACs: as `within`, or the smallest cut if that has more."""
        return self.within(max(macs, self.smallest_macs), progress=progress)

    def within(self, at_most: int, metric: Metric = "macs", progress: Progress | None = None) -> list[int]:
        """Channels to keep so that at most `at_most` MACs or parameters are left, and as close to that as the layers allow.

        Raises:
            PruningImpossible: no cut reaches it; says the best.
        """
        smallest = self.cost(self.kept(1.0))[metric]
        if smallest > at_most:
            whole = self.cost(self.kept(0.0))[metric]
            raise PruningImpossible(
                f"wanted at most {at_most:,} {metric} ({at_most / whole:.3f} of {whole:,}); with max_layer_ratio {self.rules.max_layer_ratio:g} and "
                f"round_to {self.rules.round_to} the best reached is {smallest:,} ({smallest / whole:.3f})",
                "keep more, raise max_layer_ratio, or lower round_to",
            )
        with (progress or SilentProgress()).track(f"search for {at_most:,} {metric}", 1 + BISECTIONS + len(self.groups)) as bar:

            def fits(kept: Sequence[int]) -> bool:
                bar.advance()
                return self.cost(kept)[metric] <= at_most

            return self._closest(fits)

    def left_whole(self, kept: Sequence[int]) -> list[Whole]:
        """The groups that lose nothing where each of `groups` keeps so many channels."""
        limits = self.kept(1.0)
        uncut = ((g, limit) for g, count, limit in zip(self.groups, kept, limits, strict=True) if count == g.size)
        return [*self.excluded, *(Whole(g.name, g.blocks * g.size, self._why_whole(g, limit)) for g, limit in uncut)]

    def _why_whole(self, group: Group, fewest: int) -> str:
        if fewest < group.size:
            return "the target is met without them"
        where = "" if group.blocks == 1 else f" in {group.blocks} blocks of {group.size}"
        if int(group.size * self.rules.max_layer_ratio) == 0:
            return f"max_layer_ratio {self.rules.max_layer_ratio:g} of them is less than one{where}"
        return f"round_to {self.rules.round_to} leaves nothing to cut{where}"

    def apply(self, network: Network, kept: Sequence[int]) -> History:
        """Cut `network`, the one this was made for, in place; the cut is appended to its lineage."""
        history = self.history(kept)
        replay(network, history)
        network.lineage.append({"op": "prune", "history": history})
        return history

    def _closest(self, fits: Callable[[Sequence[int]], bool]) -> list[int]:
        """Bisect the ratio; then, since layers of one width step together, give channels back layer by layer while the target holds."""
        low, high = 0.0, 1.0
        if fits(self.kept(low)):
            return self.kept(low)
        for _ in range(BISECTIONS):
            if self.kept(low) == self.kept(high):
                break
            middle = (low + high) / 2
            low, high = (low, middle) if fits(self.kept(middle)) else (middle, high)
        chosen, larger = self.kept(high), self.kept(low)
        gains = [float(g.scores[g.order[g.size - count]]) for g, count in zip(self.groups, larger, strict=True)]  # the best channel to get back
        for position in sorted(range(len(self.groups)), key=lambda p: -gains[p]):
            trial = [*chosen[:position], larger[position], *chosen[position + 1 :]]
            if trial != chosen and fits(trial):
                chosen = trial
        return chosen


class _Costs:
    """Parameters and MACs of a network after a cut, from the widths it leaves: each kind of module is cut alone, on shapes, once for each of its widths."""

    def __init__(self, shadow: nn.Module, input_shape: tuple[int, ...]) -> None:
        self._modules = dict(shadow.named_modules())
        self._pruners = _pruners(shadow)
        per_module = macs.by_module(shadow, input_shape)
        self._whole = macs.count_on_meta(shadow, input_shape)
        # a layer's MACs are its weights times the places they are applied at, and places do not change with widths
        self._places = {name: count // _weights(self._modules[name]) for name, count in per_module.items()}
        # modules of one kind, which their printed form and shapes tell, save alike
        self._kinds = {name: (repr(m), tuple(p.shape for p in m.parameters())) for name, m in self._modules.items()}
        self._known: dict[tuple[Any, ...], tuple[int, dict[str, int]]] = {}

    def after(self, history: History) -> tuple[int, int]:
        """(parameters, MACs)."""
        rows: dict[str, list[tuple[str, list[int]]]] = {}
        for name, direction, indices in history:
            rows.setdefault(name, []).append((direction, indices))
        saved = [self._saved(name, of) for name, of in rows.items()]
        return self._whole[0] - sum(s[0] for s in saved), self._whole[1] - sum(s[1] for s in saved)

    def _saved(self, name: str, rows: list[tuple[str, list[int]]]) -> tuple[int, int]:
        module = self._modules[name]
        key = (self._kinds[name], *((direction, len(indices)) for direction, indices in rows))
        if key not in self._known:
            cut = copy.deepcopy(module)
            for direction, indices in rows:
                _cut(cut, self._pruners[name], direction, indices)
            inner = {child: _weights(m) - _weights(cut.get_submodule(child)) for child, m in module.named_modules() if isinstance(m, macs.COUNTED)}
            self._known[key] = _numel(module) - _numel(cut), inner
        params, inner = self._known[key]
        return params, sum(self._places.get(f"{name}.{child}".rstrip("."), 0) * weights for child, weights in inner.items())


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _weights(module: nn.Module) -> int:
    assert isinstance(module.weight, Tensor)
    return module.weight.numel()


def survey(network: Network, rules: Rules, *, backward: Backward | None = None, progress: Progress | None = None) -> Cuts:
    """Find and score everything in `network` that may be cut; the layers that make the outputs keep their width, and so do those whose width the network's
    code takes for granted: it pads by so many channels, halves them, normalises them in groups.

    `network` stays as it is: mode, hooks, gradients and `requires_grad`.

    Args:
        network: without parametrised tensors (`parametrizations.remove`).
        backward: fills the gradients of the module it is given; "taylor" needs it (`gradients` makes one).

    Raises:
        PruningImpossible: nothing can be cut, or scores are not finite.
    """
    with (progress or SilentProgress()).track(f"score channels by {rules.criterion}", 1) as bar:
        groups, excluded = _groups(network, rules, backward)
        bar.advance()
    if not groups:
        why = "".join(f"; {reason}" for reason in dict.fromkeys(whole.why for whole in excluded))
        found = f"{network.base['arch']} has no channels that could be cut by the criterion {rules.criterion}"
        raise PruningImpossible(found + why, "choose another importance, or leave prune out")
    return Cuts(network, groups, excluded, rules)


def prune(
    network: Network,
    at_most: int,
    rules: Rules = Rules(),
    *,
    metric: Metric = "macs",
    backward: Backward | None = None,
    progress: Progress | None = None,
) -> History:
    """Cut `network` in place until it has at most `at_most` MACs or parameters, and as close to that as its layers allow.

    Mode, hooks and `requires_grad` are left as found. The cut is appended to `network.lineage`.

    Raises:
        PruningImpossible: no cut reaches the target (says the best), or scores are not finite.
    """
    cuts = survey(network, rules, backward=backward, progress=progress)
    return cuts.apply(network, cuts.within(at_most, metric, progress))


def replay(network: nn.Module, history: Sequence[Sequence[Any]]) -> None:
    """Cut exactly what `history` says. Works on weights and on shapes alone (meta tensors).

    Raises:
        ArtifactMismatch: a module or channel that this network has not.
    """
    pruners = _pruners(network)
    for name, direction, indices in history:
        try:
            module = network.get_submodule(name)
        except AttributeError as exc:
            raise ArtifactMismatch(f"pruning history names the module {name}, which this network has not") from exc
        if not indices:
            raise ArtifactMismatch(f"pruning history has an entry for {name} that cuts no channel")
        pruner = pruners[name]
        width = pruner.get_out_channels(module) if direction == "out" else pruner.get_in_channels(module)
        if not 0 <= min(indices) <= max(indices) < width or len(set(indices)) == width:
            raise ArtifactMismatch(f"pruning history cuts {len(indices)} channels up to {max(indices)} of {name}, which has {width}")
        _cut(module, pruner, direction, indices)


def _pruners(network: nn.Module) -> dict[str, Any]:
    """By module path, looked up before the first cut: a grouped convolution cut to one channel a group would pass for a depthwise one."""
    graph = tp.DependencyGraph()
    return {name: graph.get_pruner_of_module(module) for name, module in network.named_modules()}


def _cut(module: nn.Module, pruner: Any, direction: str, indices: Sequence[int]) -> None:
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


def _groups(network: Network, rules: Rules, backward: Backward | None) -> tuple[list[Group], list[Whole]]:
    """Every group that may be cut, scored, and those that may not. All tracing is done on a copy: Torch-Pruning switches modes and needs gradients."""
    probe = macs.without_hooks(copy.deepcopy(network)).cpu().eval().requires_grad_(True)
    graph = tp.DependencyGraph().build_dependency(probe, example_inputs=torch.rand(1, *network.input_shape))
    probe.zero_grad()
    if rules.criterion == "taylor":
        if backward is None:
            raise ValueError("taylor needs `backward`")
        backward(probe)
    importance = _importance(rules)
    names = {module: name for name, module in probe.named_modules()}
    shadow = macs.on_meta(probe)
    last = list(macs.by_module(shadow, network.input_shape))[-1]  # as called: the head, most likely
    groups, excluded = [], []
    for members in graph.get_all_groups(ignored_layers=[], root_module_types=(nn.Conv2d, nn.Linear)):
        name, channels = names[members[0].dep.target.module], len(members[0].idxs)
        if _overruns(members, graph):
            excluded.append(Whole(name, channels, TAKEN_FOR_GRANTED))
        elif _miscut(members):
            excluded.append(Whole(name, channels, "Torch-Pruning cannot cut transposed convolutions of several groups"))
        elif (scores := importance(members)) is None:
            if name != last:
                excluded.append(Whole(name, channels, f"there is no BatchNorm for {rules.criterion} to score them by"))
        elif (group := _group(members, scores, names, graph)).size == 1:
            excluded.append(Whole(name, channels, "one channel is the least"))
        else:
            groups.append(group)
    inner, fixed = _inner(groups, last, shadow, network.input_shape)
    return inner, [*excluded, *(Whole(g.name, g.blocks * g.size, TAKEN_FOR_GRANTED) for g in fixed)]


def _normalizer(name: Normalizer) -> Callable[[Tensor], Tensor]:
    """Torch-Pruning's of that name, which divides a group of zeros (unused, or before a BatchNorm that starts at zero) by zero; here zeros stay."""

    def normalize(scores: Tensor) -> Tensor:
        scale = scores.mean() if name == "mean" else scores.max()
        return scores if scale == 0 else scores / scale

    return normalize


def _importance(rules: Rules) -> Callable[[Any], Tensor | None]:
    normalizer = _normalizer(rules.normalizer)
    scorers: dict[str, Callable[[], Any]] = {
        "group_magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2, normalizer=normalizer),
        "group_magnitude_l1": lambda: tp.importance.GroupMagnitudeImportance(p=1, normalizer=normalizer),
        "taylor": lambda: tp.importance.GroupTaylorImportance(normalizer=normalizer),
        "bn_scale": lambda: tp.importance.BNScaleImportance(normalizer=normalizer),
    }
    scorer: Callable[[Any], Tensor | None] = scorers[rules.criterion]()
    return scorer


def _overruns(members: Any, graph: Any) -> bool:
    """Whether a group has channels that one of its modules lacks: Torch-Pruning takes an identity that is padded by channels for one that is as wide."""
    for dependency, indices in members:
        width_of = graph.get_out_channels if graph.is_out_channel_pruning_fn(dependency.handler) else graph.get_in_channels
        width = None if isinstance(dependency.target.module, nn.Parameter) else width_of(dependency.target)
        if width is not None and max(indices) >= width:
            return True
    return False


def _miscut(members: Any) -> bool:
    """Whether Torch-Pruning would cut a grouped transposed convolution, whose weight [in, out / groups, …] it takes for a convolution's."""
    modules = (dependency.target.module for dependency, _ in members)
    return any(isinstance(m, nn.ConvTranspose2d) and 1 < m.groups < m.out_channels for m in modules)


def _group(members: Any, scores: Tensor, names: dict[nn.Module, str], graph: Any) -> Group:
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
            blocks = math.lcm(blocks, module.groups)
        direction: Literal["out", "in"] = "out" if graph.is_out_channel_pruning_fn(dependency.handler) else "in"
        roots = [-1 if root is None else root for root in members[position].root_idxs]
        slices.append(Slice(names[module], direction, np.asarray(indices, dtype=np.int64), np.asarray(roots, dtype=np.int64)))
    name = slices[0].module
    if not torch.isfinite(scores).all():
        raise PruningImpossible(f"the importance of {name}'s channels is not finite: its weights or gradients are NaN or infinite", "train with a lower lr")
    return Group(name, blocks, scores.detach().float().cpu().view(blocks, -1).mean(0), tuple(slices))


def _inner(groups: Sequence[Group], last: str, shadow: nn.Module, input_shape: tuple[int, ...]) -> tuple[list[Group], list[Group]]:
    """The groups that the output does not depend on, neither its width nor whether there is one; and those of fixed width, without which there is none, or
    not one row an image. The others make its width. Many are cut at once, and halved only where the output depends on them.

    Once each group's first channel is cut, and once its last: code that takes channels by their places (slices, chunks) goes on without one of them and
    fails without the other.

    Args:
        last: the layer called last.
    """
    width = _output_shape(shadow, input_shape)
    suspects = [g for g in groups if any((s.module, s.direction) == (last, "out") for s in g.slices)]
    fixed: list[Group] = []

    def shape_without(some: Sequence[Group], order: int) -> tuple[int, ...] | None:
        candidate = copy.deepcopy(shadow)
        placed = [replace(g, scores=order * torch.arange(float(g.size))) for g in some]
        replay(candidate, _merged([row for g in placed for row in g.history(g.size - 1)]))
        return _output_shape(candidate, input_shape)

    def found(some: Sequence[Group]) -> list[Group]:
        shape = shape_without(some, 1)
        if shape == width:
            shape = shape_without(some, -1)
        if shape == width:
            return list(some)
        middle = len(some) // 2
        if not middle and (shape is None or shape[0] != 1):
            fixed.extend(some)
        return found(some[:middle]) + found(some[middle:]) if middle else []

    inner = found([g for g in groups if not any(g is s for s in suspects)]) + found(suspects)
    return [g for g in groups if any(g is kept for kept in inner)], fixed


def _merged(history: History) -> History:
    """One row a module and direction: where groups meet in a concatenation, each counts the channels of the uncut module."""
    rows: dict[tuple[str, str], set[int]] = {}
    for name, direction, indices in history:
        rows.setdefault((name, direction), set()).update(indices)
    return [[name, direction, sorted(indices)] for (name, direction), indices in rows.items()]


def _output_shape(shadow: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """None of a network that does not run, since widths do not fit together, or makes no rows any more."""
    try:
        with torch.no_grad():
            return tuple(shadow(torch.empty(1, *input_shape, device="meta")).shape)
    except (RuntimeError, ValueError, UsageError):
        return None
