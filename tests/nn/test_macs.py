"""Counts against arithmetic and against published figures."""

import pytest
import torch
from torch import nn

from deployopt.nn import macs, models
from deployopt.runtime.preprocessing import Preprocessing


def test_a_small_networks_counts_are_the_analytic_ones() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4), nn.Flatten(), nn.Linear(512, 5))
    assert macs.count(net, (3, 16, 16)) == (3 * 72 + 8 + 8 * 18 + 8 + 512 * 5 + 5, 16 * 16 * 8 * 27 + 8 * 8 * 8 * 18 + 512 * 5)


def test_a_transposed_convolution_multiplies_each_input_value_by_its_kernel() -> None:
    net = nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False)
    assert macs.count(net, (4, 5, 5)) == (4 * 6 * 4, 5 * 5 * 4 * 6 * 4)


@pytest.mark.parametrize(
    ("arch", "params", "multiply_accumulates"),  # torchvision's table of weights: params, and GFLOPS in its unit of multiply-accumulates
    [("resnet18", 11_689_512, 1_814_073_344), ("resnet50", 25_557_032, 4_089_184_256), ("resnext50_32x4d", 25_028_904, 4_230_479_872)],
)
def test_published_counts_at_224_pixels(arch: str, params: int, multiply_accumulates: int) -> None:
    with torch.device("meta"):
        net = models.build({"arch": arch, "outputs": 1000}, Preprocessing(224))
    assert macs.count(net, net.input_shape) == (params, multiply_accumulates)


def test_counting_leaves_the_network_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    macs.count(net, (3, 8, 8))
    assert net.training
    assert all(not module._forward_hooks for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
