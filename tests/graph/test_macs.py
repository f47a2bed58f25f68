import numpy as np
from onnx import TensorProto, helper, numpy_helper
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


def test_a_transposed_convolution_multiplies_what_it_reads():
    image, outcome = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", c, size, size]) for name, c, size in (("x", 8, 5), ("y", 6, 10)))
    node = helper.make_node("ConvTranspose", ["x", "up.weight"], ["y"], strides=[2, 2], group=2)
    weight = numpy_helper.from_array(np.zeros((8, 3, 2, 2), np.float32), "up.weight")
    model = helper.make_model(helper.make_graph([node], "up", [image], [outcome], [weight]), opset_imports=[helper.make_opsetid("", 21)])
    assert by_node(canonicalize(model)) == {"up": 8 * 5 * 5 * 3 * 2 * 2}
