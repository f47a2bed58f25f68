"""Cuts reach their target, keep the outputs, and are rebuilt exactly from their history."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from small_networks import PREPROCESSING, concatenating, depthwise, resnet8, resnext
from torch import Tensor, nn

from deployopt.data import Dataset
from deployopt.errors import ArtifactMismatch, PruningImpossible
from deployopt.nn import checkpoint, macs, models, pruning
from deployopt.nn.models import Network
from deployopt.nn.pruning import Rules
from deployopt.runtime.progress import SilentProgress
from deployopt.tasks import classification


def counts(net: Network) -> tuple[int, int]:
    return macs.count(net, net.input_shape)


@pytest.mark.parametrize("make", [resnet8, resnext, depthwise, concatenating])
@pytest.mark.parametrize("across_layers", [False, True])
def test_the_target_is_met_closely_and_replay_is_exact(make, across_layers: bool) -> None:  # type: ignore[no-untyped-def]
    net = make().train()
    rebuilt = copy.deepcopy(net)
    next(iter(net.body.parameters())).requires_grad_(False)
    target = int(counts(net)[1] * 0.5)
    history = pruning.prune(net, target, Rules(across_layers=across_layers))
    assert 0.85 * target <= counts(net)[1] <= target
    assert net.training
    assert [p.requires_grad for p in net.parameters()] == [False] + [True] * (len(list(net.parameters())) - 1)
    assert net.lineage == [{"op": "prune", "history": history}]
    pruning.replay(rebuilt, history)
    x = torch.rand(3, 3, 16, 16)
    with torch.inference_mode():
        wanted = net.eval()(x)
        assert wanted.shape == (3, 7)
        assert torch.equal(rebuilt.eval()(x), wanted)


@pytest.mark.parametrize("make", [resnet8, resnext, depthwise, concatenating])
def test_cost_from_widths_is_what_is_left_after_the_cut(make) -> None:  # type: ignore[no-untyped-def]
    cuts = pruning.survey(make(), Rules(across_layers=True))
    for ratio in (0.0, 0.3, 0.6, 1.0):
        kept, cut = cuts.kept(ratio), make()
        cuts.apply(cut, kept)
        assert tuple(cuts.cost(kept).values()) == counts(cut)


def test_channels_that_meet_in_a_concatenation_go_with_their_own_inputs() -> None:
    net = concatenating()
    with torch.no_grad():  # nobody reads these channels, so cutting them changes nothing
        net.body.joined.weight[:, [1, 4]] = 0
        net.body.joined.weight[:, [8 + 3, 8 + 5, 8 + 15]] = 0
        for parameter in (net.body.left.weight, net.body.right.weight):
            parameter[[1, 4] if len(parameter) == 8 else [3, 5, 15]] *= 1e-3
    cuts = pruning.survey(net, Rules())
    x = torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        wanted = net(x)
        cuts.apply(net, [{"body.left": 6, "body.right": 13}.get(g.name, g.size) for g in cuts.groups])
        assert net.body.joined.in_channels == 19
        torch.testing.assert_close(net(x), wanted)


class Padding(nn.Module):
    """A residual block whose identity is padded by so many channels (option A of https://arxiv.org/abs/1512.03385), and a gate of half of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.gated, self.head = nn.Conv2d(16, 8, 1), nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.b(self.a(x).relu()) + nn.functional.pad(x, (0, 0, 0, 0, 4, 4))).relu()
        value, gate = self.gated(x).chunk(2, 1)
        return self.head((value * gate.sigmoid()).mean((2, 3)))


def test_channels_whose_number_the_code_takes_for_granted_stay() -> None:
    torch.manual_seed(0)
    net = Network(Padding(), {"arch": "padding", "outputs": 7}, PREPROCESSING).eval()
    assert [group.name for group in pruning.survey(net, Rules()).groups] == ["body.a"]
    pruning.prune(net, int(counts(net)[1] * 0.7))
    assert net.body.a.out_channels < 16
    with torch.inference_mode():
        assert net(torch.rand(2, 3, 16, 16)).shape == (2, 7)


def whys(cuts: pruning.Cuts, kept: list[int]) -> dict[str, str]:
    return {whole.name: whole.why for whole in cuts.left_whole(kept)}


def test_groups_that_stay_whole_are_told_with_the_reason() -> None:
    cuts = pruning.survey(Network(Padding(), {"arch": "padding", "outputs": 7}, PREPROCESSING), Rules())
    assert whys(cuts, [8]) == dict.fromkeys(["body.b", "body.gated"], pruning.TAKEN_FOR_GRANTED)  # the head is no such group
    assert [whole.channels for whole in cuts.left_whole([8])] == [16, 8]
    assert whys(cuts, [16])["body.a"] == "the target is met without them"
    assert whys(cuts.with_rules(round_to=16), [16])["body.a"] == "round_to 16 leaves nothing to cut"
    narrow = pruning.survey(depthwise(), Rules(max_layer_ratio=0.05))
    assert whys(narrow, narrow.kept(1.0)) == {"body.2": "max_layer_ratio 0.05 of them is less than one"}
    assert whys(pruning.survey(depthwise(), Rules("bn_scale")), [8]) == {"body.4": "there is no BatchNorm for bn_scale to score them by"}
    grouped = pruning.survey(resnext(), Rules(round_to=8))
    whole = {w.name: w for w in grouped.left_whole(grouped.kept(0.5))}
    assert whole["body.layer1.0.conv2"] == pruning.Whole("body.layer1.0.conv2", 128, "round_to 8 leaves nothing to cut in 32 blocks of 4")


def test_nothing_to_cut_says_why() -> None:
    with pytest.raises(PruningImpossible, match=r"concatenating has no channels .* by the criterion bn_scale; there is no BatchNorm for bn_scale"):
        pruning.survey(concatenating(), Rules("bn_scale"))


class Placed(nn.Module):
    """Channels that the code takes by their places, groups of 2 and of 3 side by side, and a transposed convolution in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.sliced, self.rest = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.joined = nn.Conv2d(20, 24, 1)
        self.twos, self.threes = nn.Conv2d(24, 24, 3, padding=1, groups=2), nn.Conv2d(24, 24, 3, padding=1, groups=3)
        self.up, self.head = nn.ConvTranspose2d(24, 16, 2, 2, groups=4), nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.joined(torch.cat([self.sliced(x[:, :8]), self.rest(x[:, 8:])], 1)).relu()
        return self.head(self.up((self.twos(x).relu() + self.threes(x)).relu()).mean((2, 3)))


def test_whichever_channels_go_the_network_still_runs() -> None:
    net = Network(Placed(), {"arch": "placed", "outputs": 7}, PREPROCESSING).eval()
    cuts = pruning.survey(net, Rules())
    assert {group.name: group.blocks for group in cuts.groups} == {"body.joined": 6, "body.sliced": 1, "body.rest": 1}
    for seed in range(6):
        torch.manual_seed(seed)
        cuts.groups = tuple(replace(group, scores=torch.rand(group.size)) for group in cuts.groups)
        kept, cut = [int(group.size * 0.6) for group in cuts.groups], copy.deepcopy(net)
        cuts.apply(cut, kept)
        with torch.inference_mode():
            assert cut(torch.rand(2, 3, 16, 16)).shape == (2, 7)
        assert tuple(cuts.cost(kept).values()) == counts(cut)


def test_mode_hooks_gradients_and_frozen_parameters_are_left_as_found(colours: Dataset) -> None:
    net = resnet8(colours.preprocessing, outputs=3).train()
    net.body.layer1.eval()
    net.body.bn1.weight.requires_grad_(False)
    passes: list[int] = []
    net.body.fc.register_forward_hook(lambda *_: passes.append(1))
    net(torch.rand(4, *net.input_shape)).sum().backward()
    gradient = net.body.conv1.weight.grad.clone()
    modes = {name: module.training for name, module in net.named_modules()}
    for criterion in ("group_magnitude", "taylor"):
        pruning.survey(net, Rules(criterion), backward=pruning.gradients(colours, classification, samples=16, seed=0))
        assert torch.equal(net.body.conv1.weight.grad, gradient)
    assert pruning.prune(net, counts(net)[1] // 2)
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["body.bn1.weight"]
    assert passes == [1]
    assert len(net.body.fc._forward_hooks) == 1


def test_a_network_is_pruned_alike_whatever_was_pruned_before() -> None:
    histories = []
    for _ in range(2):  # Torch-Pruning's default arguments are shared between calls
        net = resnet8()
        histories.append(pruning.prune(net, counts(net)[1] // 2))
        pruning.survey(depthwise(), Rules())
    assert histories[0] == histories[1]


def test_residual_partners_lose_the_same_channels_and_the_head_keeps_its_outputs() -> None:
    net = resnet8()
    history = pruning.prune(net, counts(net)[1] // 2)
    cut = {(name, direction): indices for name, direction, indices in history}
    assert cut["body.conv1", "out"] == cut["body.layer1.0.conv2", "out"] == cut["body.layer1.0.bn2", "out"]
    assert cut["body.layer2.0.conv2", "out"] == cut["body.layer2.0.downsample.0", "out"] == cut["body.layer3.0.conv1", "in"]
    assert ("body.fc", "out") not in cut


def test_a_share_that_would_empty_a_layer_leaves_one_channel() -> None:
    net = resnet8()
    cuts = pruning.survey(net, Rules(max_layer_ratio=0.999))
    assert set(cuts.kept(1.0)) == {1}
    cuts.apply(net, cuts.kept(1.0))
    with torch.inference_mode():
        assert net.eval()(torch.rand(2, 3, 16, 16)).shape == (2, 7)


def test_a_grouped_convolution_keeps_its_groups_at_one_channel_each() -> None:
    net = resnext()
    history = pruning.prune(net, int(counts(net)[1] * 0.04))
    grouped = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert [m.groups for m in grouped] == [32] * 4
    assert grouped[0].out_channels == 32
    rebuilt = resnext()
    pruning.replay(rebuilt, history)
    with torch.inference_mode():
        assert rebuilt.eval()(torch.rand(2, 3, 16, 16)).shape == (2, 7)


def test_every_criterion_prunes_by_its_own_and_repeats_bit_for_bit(colours: Dataset) -> None:
    def pruned(criterion: pruning.Criterion) -> pruning.History:
        net = resnet8(colours.preprocessing, outputs=3)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
        backward = pruning.gradients(colours, classification, samples=32, seed=0)
        history = pruning.prune(net, int(counts(net)[0] * 0.6), Rules(criterion), metric="params", backward=backward)
        assert counts(net)[0] <= 0.6 * counts(resnet8(colours.preprocessing, outputs=3))[0]
        assert all(p.grad is None for p in net.parameters())
        return history

    first, again = ([pruned(criterion) for criterion in get_args(pruning.Criterion)] for _ in range(2))
    assert first == again
    assert all(one != other for one, other in combinations(first, 2))


@pytest.mark.parametrize("normalizer", get_args(pruning.Normalizer))
@pytest.mark.parametrize("criterion", ["bn_scale", "taylor"])
def test_channels_that_matter_nothing_all_together_rank_lowest(criterion: pruning.Criterion, normalizer: pruning.Normalizer, colours: Dataset) -> None:
    net = resnet8(colours.preprocessing, outputs=3)
    block = net.body.layer2[0]
    with torch.no_grad():
        block.bn1.weight.zero_()  # as zero_init_residual does
        if criterion == "taylor":
            block.bn1.bias.fill_(-1.0)  # dead: its ReLU passes nothing on, and no gradient back
    backward = pruning.gradients(colours, classification, samples=16, seed=0)
    cuts = pruning.survey(net, Rules(criterion, normalizer, across_layers=True), backward=backward)
    scores = {group.name: group.scores for group in cuts.groups}
    assert not scores["body.layer2.0.conv1"].any()
    assert all(found.sum() > 0 for name, found in scores.items() if name != "body.layer2.0.conv1")
    zeros = [int((found == 0).sum()) for found in scores.values()]
    kept = cuts.kept((sum(zeros) + 0.5) / sum(group.size for group in cuts.groups))
    least = [group.size - int(group.size * cuts.rules.max_layer_ratio) for group in cuts.groups]
    assert kept == [max(few, group.size - none) for few, group, none in zip(least, cuts.groups, zeros, strict=True)]


def test_equal_scores_are_cut_evenly_over_layers_and_to_the_target() -> None:
    net = resnet8()  # untrained: every γ is 1
    whole = counts(net)[1]
    cuts = pruning.survey(net, Rules("bn_scale", across_layers=True))
    assert len(torch.cat([group.scores for group in cuts.groups]).unique()) == 1
    assert [kept / group.size for kept, group in zip(cuts.kept(0.5), cuts.groups, strict=True)] == [0.5] * len(cuts.groups)
    history = pruning.prune(net, whole // 2, Rules("bn_scale", across_layers=True))
    assert 0.85 * whole // 2 <= counts(net)[1] <= whole // 2
    assert pruning.prune(resnet8(), whole // 2, Rules("bn_scale", across_layers=True)) == history


def test_the_least_important_channels_go() -> None:
    net = resnet8()
    weak = [1, 4, 9, 15]
    with torch.no_grad():
        for parameter in (net.body.layer1[0].conv1.weight, net.body.layer1[0].bn1.weight, net.body.layer1[0].bn1.bias):
            parameter[weak] *= 1e-3
        net.body.layer1[0].conv2.weight[:, weak] *= 1e-3
    history = pruning.prune(net, int(counts(net)[1] * 0.8))
    (cut,) = [indices for name, direction, indices in history if (name, direction) == ("body.layer1.0.conv1", "out")]
    assert set(cut[:4]) <= set(weak) or set(weak) <= set(cut)


def test_kept_channels_are_multiples_and_no_layer_loses_more_than_allowed() -> None:
    net = resnet8()
    pruning.prune(net, int(counts(net)[1] * 0.6), Rules(across_layers=True, round_to=4, max_layer_ratio=0.5))
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            whole = resnet8().get_submodule(name).out_channels
            assert module.out_channels % 4 == 0
            assert module.out_channels >= whole / 2


def test_a_pruned_network_is_pruned_again_and_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = models.build({"arch": "resnet20", "outputs": 7}, PREPROCESSING)
    whole = counts(net)[0]
    for ratio in (0.7, 0.4):
        pruning.prune(net, int(whole * ratio), Rules("bn_scale"), metric="params")
    assert counts(net)[0] <= 0.4 * whole
    assert len(net.lineage) == 2
    checkpoint.save(tmp_path, net)
    x = torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(checkpoint.load(tmp_path)(x), net.eval()(x))


def test_a_target_above_the_network_cuts_nothing() -> None:
    net = resnet8()
    assert pruning.prune(net, counts(net)[1]) == []
    assert counts(net) == counts(resnet8())


def test_an_unreachable_target_says_the_best_and_cuts_nothing() -> None:
    net = resnet8()
    with pytest.raises(PruningImpossible, match=r"(?s)the best reached is [\d,]+ \(0\.\d+\).*max_layer_ratio"):
        pruning.prune(net, 1000)
    assert counts(net) == counts(resnet8())
    assert net.lineage == []


def test_weights_that_are_not_finite_are_named() -> None:
    net = resnet8()
    with torch.no_grad():
        net.body.layer2[0].bn1.weight[0] = float("nan")
    with pytest.raises(PruningImpossible, match=r"body\.layer2\.0\.conv1's channels is not finite"):
        pruning.prune(net, int(counts(net)[1] * 0.5), Rules("bn_scale"))


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([["body.layer9", "out", [0]]], "names the module body.layer9"),
        ([["body.conv1", "out", [16]]], "up to 16 of body.conv1, which has 16"),
        ([["body.conv1", "out", list(range(16))]], "cuts 16 channels"),
        ([["body.conv1", "out", []]], "has an entry for body.conv1 that cuts no channel"),
    ],
)
def test_a_history_of_another_network_is_refused(history: pruning.History, message: str) -> None:
    with pytest.raises(ArtifactMismatch, match=message):
        pruning.replay(resnet8(), history)


def test_scoring_and_the_search_show_progress() -> None:
    seen: dict[str, float] = {}

    class Recording(SilentProgress):
        @contextmanager
        def track(self, description: str, total: float) -> Iterator[SimpleNamespace]:
            seen[description] = 0

            def advance(steps: float = 1, note: str = "") -> None:
                seen[description] += steps

            yield SimpleNamespace(advance=advance)
            assert seen[description] <= total

    net = resnet8().eval()
    wanted = macs.count(net, net.input_shape)[1] // 2
    pruning.prune(net, wanted, progress=Recording())
    assert seen["score channels by group_magnitude"] == 1
    assert seen[f"search for {wanted:,} macs"] > 5
