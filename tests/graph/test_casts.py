import numpy as np
import pytest
from onnx import TensorProto, numpy_helper
from residual_onnx import images, quantized, residual, run

from deployopt.errors import ExportFailed
from deployopt.graph.canonical import canonicalize
from deployopt.graph.casts import cast
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
