from residual_onnx import quantized, residual

from deployopt.graph.canonical import canonicalize
from deployopt.graph.macs import by_node

COUNTED_BY_HAND = {
    "conv1": 16 * 16 * 16 * 3 * 9,
    "layer1.0.conv1": 8 * 8 * 16 * 16 * 9,
    "layer1.0.conv2": 8 * 8 * 16 * 16 * 9,
    "layer2.0.conv1": 4 * 4 * 32 * 16 * 9,
    "layer2.0.conv2": 4 * 4 * 32 * 32 * 9,
    "layer2.0.downsample.0": 4 * 4 * 32 * 16,
    "fc": 32 * 10,
}


def test_macs_are_those_counted_by_hand():
    assert by_node(canonicalize(residual())) == COUNTED_BY_HAND


def test_quantisation_changes_no_macs():
    assert by_node(canonicalize(quantized()[0])) == COUNTED_BY_HAND
