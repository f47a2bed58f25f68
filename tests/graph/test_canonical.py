import json

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper
from residual_onnx import CONVOLUTIONS, images, quantized, residual, run

from deployopt.errors import ExportFailed
from deployopt.graph.canonical import canonicalize, quantize, stored_scales
from deployopt.graph.checks import check


def test_a_quantised_graph_keeps_its_numbers_and_stores_weights_as_int8():
    model, scales = quantized()
    canonical = canonicalize(model, scales=scales)
    check(canonical)
    np.testing.assert_array_equal(run(canonical, images(8)), run(model, images(8)))
    stored = {t.name: t for t in canonical.graph.initializer}
    for name in (*CONVOLUTIONS, "fc"):
        assert stored[f"{name}.weight"].data_type == TensorProto.INT8
    assert stored_scales(canonical) == {layer: pytest.approx(roles) for layer, roles in scales.items()}
    assert len(canonical.SerializeToString()) < len(model.SerializeToString()) / 2


def test_names_are_the_modules_names_and_no_paths_are_left():
    canonical = canonicalize(quantized()[0], metadata={"preprocessing": "{}"})
    names = {t.name for t in canonical.graph.initializer}
    assert {"conv1.input.scale", "conv1.input.zero_point", "layer1.0.conv2.weight.scale", "fc.input.scale"} <= names
    assert not any(name.startswith("val_") for name in names)
    assert {n.name for n in canonical.graph.node if n.op_type == "Conv"} == set(CONVOLUTIONS)
    assert b"elsewhere" not in canonical.SerializeToString()
    assert [(p.key, p.value) for p in canonical.metadata_props] == [("preprocessing", "{}")]
    assert (canonical.producer_name, canonical.ir_version) == ("deployopt", 10)


def test_the_argument_is_left_as_it_was():
    model, scales = quantized()
    before = model.SerializeToString(deterministic=True)
    canonicalize(model, scales=scales)
    assert model.SerializeToString(deterministic=True) == before


def test_canonical_form_is_a_fixed_point():
    model, scales = quantized()
    once = canonicalize(model, scales=scales)
    assert canonicalize(once, scales=stored_scales(once)).SerializeToString(deterministic=True) == once.SerializeToString(deterministic=True)


def reduced(axes, keepdims, rank=4, opset=21):
    shape = ["batch", 4, 6, 5][:rank]
    extra = {"axes": axes} if opset < 18 else {}
    inputs = ["x"] if opset < 18 else ["x", "axes"]
    node = helper.make_node("ReduceMean", inputs, ["y"], "mean", keepdims=keepdims, **extra)
    constants = [] if opset < 18 else [numpy_helper.from_array(np.array(axes, np.int64), "axes")]
    left = rank if keepdims else rank - len(axes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch"] + [None] * (left - 1))],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [[2, 3], [-1, -2]])
def test_a_mean_over_height_and_width_is_a_global_pool(axes, keepdims, opset):
    model = reduced(axes, keepdims, opset=opset)
    canonical = canonicalize(model)
    x = np.random.default_rng(0).random((2, 4, 6, 5), dtype=np.float32)
    assert canonical.graph.node[0].op_type == "GlobalAveragePool"
    np.testing.assert_allclose(run(canonical, x), run(model, x), rtol=1e-6)


@pytest.mark.parametrize(("axes", "rank"), [([1, 2], 4), ([3], 4), ([1, 2, 3], 4), ([2], 3)])
def test_other_means_stay(axes, rank):
    assert [n.op_type for n in canonicalize(reduced(axes, 1, rank)).graph.node] == ["ReduceMean"]


@given(
    values=arrays.arrays(np.float32, (3, 7), elements=st.floats(-300, 300, width=32)),
    scale=arrays.arrays(np.float32, (3,), elements=st.floats(2.0**-20, 4, width=32)),
)
def test_folding_rounds_as_the_runtime_does(values, scale):
    zero = np.zeros(3, np.int8)
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=0)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 7])],
        [helper.make_tensor_value_info("q", TensorProto.INT8, [3, 7])],
        [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(zero, "z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    np.testing.assert_array_equal(quantize(values, scale, zero, axis=0), run(model, values))


def test_halves_round_to_even_and_the_ends_saturate():
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -128.5, 1e30, -1e30], np.float32)
    np.testing.assert_array_equal(quantize(values, np.float32(1), np.int8(0), axis=0), [0, 2, 2, 0, -2, 126, 127, -128, 127, -128])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(value):
    model, _ = quantized()
    tensor = next(t for t in model.graph.initializer if t.name == "layer1.0.conv1.weight")
    broken = numpy_helper.to_array(tensor).copy()
    broken[0, 0, 0, 0] = value
    tensor.CopyFrom(numpy_helper.from_array(broken, tensor.name))
    with pytest.raises(ExportFailed, match=r"layer1\.0\.conv1\.weight.*NaN or infinite"):
        canonicalize(model)


def test_a_zero_scale_is_named():
    model, _ = quantized()
    tensor = next(t for t in model.graph.initializer if t.name == "val_conv1.weight_s")
    tensor.CopyFrom(numpy_helper.from_array(np.zeros(16, np.float32), tensor.name))
    with pytest.raises(ExportFailed, match=r"scale of the weight 'conv1\.weight'.*found 0"):
        canonicalize(model)


@pytest.mark.parametrize("value", [0.0, 1e-40, np.inf])
def test_an_activations_scale_that_is_none_is_named(value):
    model, _ = quantized()
    name = next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "normal").input[1]
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.float32(value), tensor.name))
    with pytest.raises(ExportFailed, match=f"scale of the tensor 'normal' must be finite, positive and at least 1.2e-38, .*found {float(np.float32(value)):g}"):
        canonicalize(model)


@pytest.mark.parametrize(("scales", "wanted"), [({"layer9": {"output": 1.0}}, "layer9.*not in the graph"), ({"conv1": {"output": 0.0}}, "conv1.*positive")])
def test_scales_that_fit_nothing_are_refused(scales, wanted):
    with pytest.raises(ExportFailed, match=wanted):
        canonicalize(residual(), scales=scales)


def test_a_shared_float_weight_keeps_its_name():
    model, _ = quantized()
    model.graph.node.append(helper.make_node("ReduceMean", ["conv1.weight"], ["spread"], keepdims=0))
    model.graph.output.append(helper.make_tensor_value_info("spread", TensorProto.FLOAT, []))
    canonical = canonicalize(model)
    kinds = {t.name: t.data_type for t in canonical.graph.initializer}
    assert kinds["conv1.weight"] == TensorProto.FLOAT
    assert kinds["conv1.weight.quantized"] == TensorProto.INT8
    onnx.checker.check_model(canonical, full_check=True)


def test_scales_are_stored_as_json():
    model, scales = quantized()
    entry = next(p for p in canonicalize(model, scales=scales).metadata_props if p.key == "deployopt.scales")
    assert set(json.loads(entry.value)) == set(scales)
