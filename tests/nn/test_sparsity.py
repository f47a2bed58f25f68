"""The group regulariser is DepGraph's, and training with it empties channels."""

import copy

import torch
import torch_pruning as tp
from small_networks import depthwise, resnet8, resnext

from deployopt.data import Dataset
from deployopt.nn import pruning, sparsity, training
from deployopt.nn.schedule import TrainingConfig
from deployopt.tasks import classification


def test_gradients_are_those_of_the_authors_code() -> None:
    ours = resnet8()
    theirs = copy.deepcopy(ours)
    for parameter in (*ours.parameters(), *theirs.parameters()):
        parameter.grad = torch.ones_like(parameter)
    importance = tp.importance.GroupMagnitudeImportance(p=2, normalizer="max")
    authors = tp.pruner.GroupNormPruner(theirs, torch.rand(1, *ours.input_shape), importance, reg=5e-3, ignored_layers=[theirs.body.fc])
    authors.regularize(theirs, alpha=2**4)
    sparsity.GroupSparsity(ours, pruning.survey(ours, pruning.Rules()).groups, strength=5e-3, alpha=4.0)()
    for (name, found), wanted in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert not torch.equal(ours.body.layer1[0].conv1.weight.grad, torch.ones_like(ours.body.layer1[0].conv1.weight))


def test_grouped_and_depthwise_convolutions_are_pulled_too_and_frozen_weights_are_not() -> None:
    for net in (resnext(), depthwise()):
        frozen = next(iter(net.body.parameters()))
        for parameter in net.parameters():
            parameter.grad = None if parameter is frozen else torch.zeros_like(parameter)
        sparsity.GroupSparsity(net, pruning.survey(net, pruning.Rules()).groups, strength=1.0, alpha=0.0)()
        assert frozen.grad is None
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d) and module.groups > 1:
                assert module.weight.grad is not None
                torch.testing.assert_close(module.weight.grad, module.weight.detach())  # alpha 0: weight decay of strength 1


def test_training_with_it_makes_small_channels(colours: Dataset) -> None:
    net = resnet8(colours.preprocessing, outputs=3)
    groups = pruning.survey(net, pruning.Rules()).groups
    schedule = TrainingConfig(epochs=6, batch_size=16, lr=0.05, weight_decay=0.0, warmup_epochs=0.0, keep="last")
    plain = copy.deepcopy(net)
    training.fit(plain, colours, classification, schedule)
    training.fit(net, colours, classification, schedule, after_backward=sparsity.GroupSparsity(net, groups, strength=0.05, alpha=4.0))
    assert sparsity.small_share(plain, groups, below=0.5) < 0.1
    assert sparsity.small_share(net, groups, below=0.5) > 0.4
