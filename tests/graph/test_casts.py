import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from residual_onnx import images, quantized, residual, run

from deployopt.errors import ExportFailed
from deployopt.graph.canonical import canonicalize
from deployopt.graph.casts import cast, widen
from deployopt.graph.checks import check


@pytest.mark.parametrize(("precision", "kind"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
@pytest.mark.parametrize("int8", [False, True])
def test_everything_inside_is_typed_and_the_edges_stay_fp32(precision, kind, int8):
    model = cast(canonicalize(quantized()[0] if int8 else residual()), precision)
    check(model)
    assert {t.data_type for t in model.graph.initializer} <= {kind, TensorProto.INT8, TensorProto.INT64}
    assert [v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)] == [TensorProto.FLOAT] * 2
    assert sum(n.op_type == "Cast" for n in model.graph.node) == 2
    inside = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    assert {inside[n.output[0]] for n in model.graph.node if n.op_type in ("Conv", "Add")} == {kind}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_an_operator_reads_in_fp32_only_stays_so(precision):
    shapes = {"x": ["n", 3, 4, 4], "y": ["n", 3, 8, 8]}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    graph = helper.make_graph([helper.make_node("Resize", ["x", "", "scales"], ["y"])], "resized", [x], [y], [scales])
    model = cast(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), precision)
    check(model)
    assert [tensor.data_type for tensor in model.graph.initializer] == [TensorProto.FLOAT]
    assert [node.op_type for node in model.graph.node] == ["Cast", "Resize", "Cast"]


def test_fp16_is_near_the_float_graph():
    model = canonicalize(residual())
    wanted = run(model, images(8))
    np.testing.assert_allclose(run(cast(model, "fp16"), images(8)), wanted, atol=0.01 * np.abs(wanted).max())


def change(model, name, value):
    tensor = next(t for t in model.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] = value
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    return model


def test_a_weight_too_large_for_fp16_is_named_and_fits_bf16():
    model = change(canonicalize(residual()), "layer1.0.conv1.weight", 1e5)
    with pytest.raises(ExportFailed, match=r"'layer1\.0\.conv1\.weight' does not fit FP16: it holds 1e\+05"):
        cast(model, "fp16")
    check(cast(model, "bf16"))


def test_a_scale_that_vanishes_in_fp16_is_named():
    model = change(canonicalize(quantized()[0]), "layer1.0.conv1.weight.scale", 1e-9)
    with pytest.raises(ExportFailed, match=r"scale 'layer1\.0\.conv1\.weight\.scale' vanishes in FP16"):
        cast(model, "fp16")


def test_int8_of_an_old_opset_is_refused():
    model = canonicalize(quantized()[0])
    model.opset_import[0].version = 17
    with pytest.raises(ExportFailed, match="needs opset 19"):
        cast(model, "fp16")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("int8", [False, True])
def test_what_is_widened_computes_in_fp32_with_the_values_of_its_constants(precision, int8):
    model = cast(canonicalize(quantized()[0] if int8 else residual()), precision)
    before = model.SerializeToString(deterministic=True)
    wide = widen(model)
    check(wide)
    assert model.SerializeToString(deterministic=True) == before
    kinds = {v.type.tensor_type.elem_type for v in (*wide.graph.input, *wide.graph.value_info, *wide.graph.output)}
    assert kinds | {t.data_type for t in wide.graph.initializer} == {TensorProto.FLOAT, TensorProto.INT64} | ({TensorProto.INT8} if int8 else set())
    for narrow, kept in zip(model.graph.initializer, wide.graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(kept), numpy_helper.to_array(narrow).astype(numpy_helper.to_array(kept).dtype))


def test_a_widened_bf16_graph_is_near_the_float_graph_and_not_the_same():
    """ONNX Runtime runs it on CPUs, where it has no BF16 convolution."""
    model = canonicalize(residual())
    wanted, found = run(model, images(8)), run(widen(cast(model, "bf16")), images(8))
    assert 0 < np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()


def test_integers_that_become_floats_become_fp32():
    nodes = [
        helper.make_node("Constant", [], ["half"], value=numpy_helper.from_array(np.array([0.5], np.float16))),
        helper.make_node("Cast", ["count"], ["counted"], to=TensorProto.FLOAT16),
        helper.make_node("Mul", ["counted", "half"], ["halves"]),
    ]
    given, made = helper.make_tensor_value_info("count", TensorProto.INT64, ["n"]), helper.make_tensor_value_info("halves", TensorProto.FLOAT16, ["n"])
    wide = widen(helper.make_model(helper.make_graph(nodes, "halves", [given], [made]), opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    check(wide)
    found = run(wide, np.array([1, 3], np.int64))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [0.5, 1.5])
