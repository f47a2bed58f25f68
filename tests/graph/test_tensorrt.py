import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from residual_onnx import LAYERS, images, layers_by_kind, quantized, residual, run

from deployopt.errors import ExportFailed
from deployopt.graph.canonical import canonicalize
from deployopt.graph.casts import cast
from deployopt.graph.checks import check
from deployopt.graph.editing import Graph, attribute
from deployopt.graph.tensorrt import check_quantization, check_tensorrt8, to_rtx, to_tensorrt8


def canonical(precision):
    model = canonicalize(quantized()[0] if precision.startswith("int8") else residual())
    return cast(model, "fp16") if precision.endswith("fp16") else model


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_dialect_tells_the_same_numbers_to_the_bit(precision):
    model = canonical(precision)
    old = to_tensorrt8(model)
    check(old)
    np.testing.assert_array_equal(run(old, images(64)), run(model, images(64)))


def test_int8_with_fp16_keeps_its_integers_and_computes_the_rest_in_fp32():
    model, old = canonical("int8_fp16"), to_tensorrt8(canonical("int8_fp16"))
    check(old)
    wanted, found = run(model, images(256)), run(old, images(256))
    assert np.abs(wanted - found).max() < 0.05 * np.abs(wanted).max()
    assert (wanted.argmax(1) == found.argmax(1)).mean() >= 0.95
    assert {t.data_type for t in old.graph.initializer} == {TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT64}
    assert "Cast" not in {n.op_type for n in old.graph.node}


def test_every_layer_stays_quantised_and_weights_are_floats_behind_a_pair():
    old = to_tensorrt8(canonical("int8"))
    assert len(layers_by_kind(old)[0]) == LAYERS
    weights = {t.name: t for t in old.graph.initializer if t.name.endswith(".weight")}
    assert len(weights) == LAYERS
    assert {t.data_type for t in weights.values()} == {TensorProto.FLOAT}
    assert (old.opset_import[0].version, old.ir_version) == (17, 8)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int8_fp16"])
def test_rtx_gets_the_same_numbers_to_the_bit(precision):
    model = canonical(precision)
    told = to_rtx(model)
    check(told)
    check_quantization(told.graph)
    np.testing.assert_array_equal(run(told, images(64)), run(model, images(64)))


def test_rtx_quantises_feature_maps_by_channel_and_convolutions_still_read_one_scale():
    told = to_rtx(canonical("int8"))
    graph = Graph(told.graph)
    channels = [graph.constant(q.input[1]).size for q in graph.nodes("QuantizeLinear") if graph.constant(q.input[1]).ndim]
    assert 3 in channels  # the image
    assert len(channels) == len(graph.nodes("QuantizeLinear")) - 1  # all but what the head reads
    for quantizer in graph.nodes("QuantizeLinear"):
        scale, zero = (graph.constant(name) for name in quantizer.input[1:])
        assert scale.shape == zero.shape
        assert not scale.ndim or attribute(quantizer, "axis", None) == 1
        for dequantizer in graph.consumers[quantizer.output[0]]:
            assert graph.constant(dequantizer.input[1]).shape == ()
            assert (graph.constant(dequantizer.input[1]) == scale).all()


def newer(model):
    model.opset_import[0].version = 19


def newer_ir(model):
    model.ir_version = 9


def half_scale(model):
    tensor = next(t for t in model.graph.initializer if t.name == "fc.input.scale")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))


def stored_integers(model):
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.int8), "packed"))
    model.graph.node.append(helper.make_node("DequantizeLinear", ["packed", "fc.input.scale", "fc.input.zero_point"], ["unpacked"], "lone"))


def no_zero_point(model):
    next(n for n in model.graph.node if n.op_type == "DequantizeLinear").input.pop()


def axes_as_input(model):
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "axes"))
    model.graph.node.append(helper.make_node("ReduceSum", ["logits", "axes"], ["sum"], "total"))


def bfloat(model):
    model.graph.initializer.append(helper.make_tensor("wide", TensorProto.BFLOAT16, [1], [1.0]))


def unsigned(model):
    tensor = next(t for t in model.graph.initializer if t.name == "fc.input.zero_point")
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(np.uint8(0)), tensor.name))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (newer, "of opset 19; 8.x reads 17"),
        (newer_ir, "of IR version 9; 8.x reads 8"),
        (half_scale, r"scale of '.*' is float16; 8\.x reads constant float32"),
        (stored_integers, "'packed' is stored as integers behind a lone DequantizeLinear"),
        (no_zero_point, "has no constant INT8 zero point"),
        (axes_as_input, r"'total' \(ReduceSum\) takes its axes as an input"),
        (bfloat, "'wide' is BFLOAT16, which 8.x lacks"),
        (unsigned, "quantised to UINT8"),
    ],
)
def test_what_8_x_rejects_or_misreads_is_refused(damage, message):
    model = to_tensorrt8(canonical("int8"))
    check_tensorrt8(model)
    damage(model)
    with pytest.raises(ExportFailed, match=message):
        check_tensorrt8(model)


def test_an_operator_newer_than_8_x_is_named():
    model = canonicalize(residual())
    node = next(n for n in model.graph.node if n.op_type == "Relu")
    node.op_type = "Gelu"  # opset 20
    with pytest.raises(ExportFailed, match=r"no form in opset 17.*Gelu"):
        to_tensorrt8(model)
