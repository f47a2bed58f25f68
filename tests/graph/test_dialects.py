import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from residual_onnx import CONVOLUTIONS, images, layers_by_kind, quantized, residual, run

from deployopt.errors import ExportFailed
from deployopt.graph.canonical import SCALES_KEY, canonicalize
from deployopt.graph.checks import check
from deployopt.graph.dialects import keep_float_weights, to_openvino, to_unsigned
from deployopt.graph.editing import Graph, unmoved, with_shapes
from deployopt.runtime.onnxruntime_session import QUANTIZING_WEIGHTS, create
from deployopt.runtime.saturation import SATURATION_KEY, VNNI_KEY


def canonical(stem_limit=63):
    model, scales = quantized(stem_limit)
    return canonicalize(model, scales=scales)


def constants(model):
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def test_the_dialect_tells_the_same_numbers():
    signed = canonical()
    unsigned = to_unsigned(signed)
    check(unsigned)
    wanted, found = run(signed, images(256)), run(unsigned, images(256))
    # the dialect also quantises Adds and the last ReLU, so single steps differ
    assert np.abs(wanted - found).max() < 0.05 * np.abs(wanted).max()
    assert (wanted.argmax(1) == found.argmax(1)).mean() >= 0.95


def test_zero_points_are_0_where_nothing_is_negative_and_128_elsewhere():
    model = to_unsigned(canonical())
    values = constants(model)
    zero = {n.input[0]: int(values[n.input[2]]) for n in model.graph.node if n.op_type == "QuantizeLinear"}
    assert zero == {
        "normal": 128,
        "stem": 0,
        "layer1.0.relu": 0,
        "layer1.0.conv2.out": 128,
        "layer1.0.sum": 0,
        "layer2.0.relu": 0,
        "layer2.0.conv2.out": 128,
        "layer2.0.downsample.0.out": 128,
        "layer2.0.sum": 0,
        "spatial_mean": 0,
    }
    assert {values[n.input[2]].dtype for n in model.graph.node if n.op_type == "QuantizeLinear"} == {np.dtype(np.uint8)}


CHANNELS = 8
KEPT_BEHIND = {  # what stands between the integers and a layer in float, and the channels it leaves
    "nothing": ((), CHANNELS),
    "pooling": (("MaxPool", [], {"kernel_shape": [2, 2]}), CHANNELS),
    "a slice": (("Slice", [[0], [4], [1]], {}), 4),
    "padding": (("Pad", [[0, 0, 1, 1, 0, 0, 1, 1]], {}), CHANNELS),
}


@pytest.mark.parametrize("layer", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("between", KEPT_BEHIND)
def test_float_weights_behind_integers_are_not_quantised_by_onnxruntime(between, layer, tmp_path):
    """Two such layers and a quantised one share the integers; a session that quantises no weights by itself gives the same outputs."""
    moved, channels = KEPT_BEHIND[between]
    random = np.random.default_rng(0)
    values = {"s": np.float32(0.05), "z": np.int8(0), "w_s": np.float32(0.01), "w": random.integers(-127, 128, (CHANNELS, CHANNELS, 3, 3)).astype(np.int8)}
    nodes = [helper.make_node("QuantizeLinear", ["image", "s", "z"], ["q"]), helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dq"])]
    nodes += [helper.make_node("DequantizeLinear", ["w", "w_s", "z"], ["w_dq"]), helper.make_node("Conv", ["dq", "w_dq"], ["int8"])]
    read = "dq"
    if moved:
        kind, extra, attributes = moved
        values |= {f"extra{i}": np.array(value, np.int64) for i, value in enumerate(extra)}
        nodes.append(helper.make_node(kind, ["dq", *(f"extra{i}" for i in range(len(extra)))], ["moved"], **attributes))
        read = "moved"
    for name in ("a", "b"):
        shape = (CHANNELS, channels, 3, 3) if layer == "Conv" else (channels, CHANNELS, 3, 3)
        values[f"{name}.weight"] = random.normal(0, 0.2, shape).astype(np.float32)
        nodes.append(helper.make_node(layer, [read, f"{name}.weight"], [name]))
    for name in ("int8", "a", "b"):
        nodes += [
            helper.make_node("QuantizeLinear", [name, "s", "z"], [f"{name}.q"]),
            helper.make_node("DequantizeLinear", [f"{name}.q", "s", "z"], [f"{name}.out"]),
        ]
    value = helper.make_tensor_value_info
    inputs = [value("image", TensorProto.FLOAT, ["batch", CHANNELS, 12, 12])]
    outputs = [value(f"{name}.out", TensorProto.FLOAT, ["batch", CHANNELS, None, None]) for name in ("int8", "a", "b")]
    graph = helper.make_graph(nodes, "kept", inputs, outputs, [numpy_helper.from_array(np.asarray(v), k) for k, v in values.items()])
    model = with_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    guarded, feed = keep_float_weights(model), {"image": random.normal(0, 2, (2, CHANNELS, 12, 12)).astype(np.float32)}
    found = {}
    for name, written, without in (("plain", model, []), ("wanted", model, [QUANTIZING_WEIGHTS]), ("guarded", guarded, [])):
        onnx.save(written, tmp_path / f"{name}.onnx")
        found[name] = np.concatenate([o.ravel() for o in create(tmp_path / f"{name}.onnx", 1, without=without).run(None, feed)])
    np.testing.assert_array_equal(found["guarded"], found["wanted"])
    assert between == "padding" or (found["plain"] != found["wanted"]).any(), "ONNX Runtime no longer quantises such weights: `keep_float_weights` can go"


@pytest.mark.parametrize(("dialect", "optimise"), [(to_unsigned, False), (to_unsigned, True), (to_openvino, False)])
def test_what_training_clips_at_127_steps_stays_clipped(dialect, optimise):
    """Scales a third of what the images need: without a limit the u8 integers would run on to 255."""
    model = canonical()
    for tensor in model.graph.initializer:
        if tensor.name in ("pooled.scale", "layer1.0.relu.scale", "layer2.0.relu.scale"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) / np.float32(3), tensor.name))
    wanted, found = run(model, images(256)), run(dialect(model), images(256), optimise=optimise)
    assert np.abs(wanted - found).max() < 0.05 * np.abs(wanted).max()


def test_every_trained_quantizer_behind_a_relu_ends_at_127_and_no_other():
    model = to_unsigned(canonical())
    values = constants(model)
    limited = {n.input[0]: (int(values[n.input[1]]), int(values[n.input[2]])) for n in model.graph.node if n.op_type == "Clip"}
    quantizers = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    assert {quantizers[name] for name in limited} == {"stem", "layer1.0.relu", "layer1.0.sum", "layer2.0.relu", "spatial_mean"}
    assert set(limited.values()) == {(0, 127)}


def test_for_openvino_they_end_before_they_are_rounded_and_the_relu_is_part_of_that():
    model = to_openvino(canonical())
    values = constants(model)
    made = {o: n for n in model.graph.node for o in n.output}
    steps = {n.input[0]: values[n.input[1]] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    clips = {name: made[name] for name in steps if name in made and made[name].op_type == "Clip"}
    assert clips.keys() == {"stem", "layer1.0.relu", "layer1.0.sum", "layer2.0.relu", "spatial_mean.clipped"}
    for name, clip in clips.items():
        assert [float(values[limit]) for limit in clip.input[1:]] == [0, pytest.approx(127 * steps[name])]
    assert [n.output[0] for n in model.graph.node if n.op_type == "Relu"] == ["layer2.0.sum"]  # the pooling's, which uses all 255 steps


def test_openvino_keeps_signed_what_may_be_negative():
    model = to_openvino(canonical())
    check(model)
    values = constants(model)
    kinds = {n.input[0]: values[n.input[2]].dtype for n in model.graph.node if n.op_type == "QuantizeLinear"}
    signed = {"normal", "layer2.0.downsample.0.out"}
    assert {name for name, kind in kinds.items() if kind == np.int8} == signed
    assert {name for name, kind in kinds.items() if kind == np.uint8} == kinds.keys() - signed
    assert len(layers_by_kind(model)[0]) == len(CONVOLUTIONS) + 1


def test_for_openvino_every_number_up_to_the_last_pooling_is_that_of_training():
    """Biases and operands of Adds rounded on the way would change some step, and what follows makes more of it with each layer."""
    signed = canonical()
    dialect = to_openvino(signed)
    for model in (signed, dialect):
        del model.graph.output[:]
        model.graph.output.append(helper.make_tensor_value_info("layer2.0.sum", TensorProto.FLOAT, None))
    np.testing.assert_array_equal(run(signed, images(64)), run(dialect, images(64)))


def test_openvino_needs_a_convolutions_scale_only_where_something_else_than_an_add_reads_it():
    model, scales = quantized()
    without = {layer: {role: scale for role, scale in roles.items() if role == "sum"} for layer, roles in scales.items()}
    assert {n.input[0] for n in to_openvino(canonicalize(model, scales=without)).graph.node if n.op_type == "QuantizeLinear"} >= {"layer2.0.sum"}
    for node in model.graph.node:
        node.input[:] = ["layer1.0.conv2.out" if name == "layer1.0.sum_dq" else name for name in node.input]  # two readers: the Add and a float layer
    with pytest.raises(ExportFailed, match=r"needs the scale 'output' of the layer 'layer1\.0\.conv2'"):
        to_openvino(canonicalize(model, scales=without))


def test_a_result_that_only_pooling_reads_uses_all_of_u8():
    values = constants(to_unsigned(canonical()))
    _, scales = quantized()
    assert values["layer2.0.sum.scale"] == pytest.approx(scales["layer2.0.conv2"]["sum"] * 127 / 255)


def test_pooling_and_reshaping_work_on_integers():
    model = to_unsigned(canonical())
    made = {o: n for n in model.graph.node for o in n.output}
    kinds = {n.op_type: [made[name].op_type for name in n.input[:1]] for n in model.graph.node if n.op_type in ("MaxPool", "Reshape")}
    assert kinds == {"MaxPool": ["DequantizeLinear"], "Reshape": ["DequantizeLinear"]}


def test_biases_are_int32_and_every_add_is_quantised_on_both_sides():
    model = to_unsigned(canonical())
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    assert all(kinds[f"{name}.bias.quantized"] == TensorProto.INT32 for name in (*CONVOLUTIONS, "fc"))
    made = {o: n.op_type for n in model.graph.node for o in n.output}
    index = Graph(model.graph)
    readers = [n for n in model.graph.node if n.op_type in ("Add", "GlobalAveragePool", "Conv")]
    assert all(made[unmoved(index, name)] == "DequantizeLinear" for n in readers for name in n.input)
    assert len(layers_by_kind(model)[0]) == len(CONVOLUTIONS) + 1


@pytest.mark.parametrize(("layer", "role"), [("layer1.0.conv2", "output"), ("layer2.0.conv2", "sum")])
def test_a_missing_scale_names_the_layer(layer, role):
    model, scales = quantized()
    del scales[layer][role]
    with pytest.raises(ExportFailed, match=f"needs the scale '{role}' of the layer '{layer}'"):
        to_unsigned(canonicalize(model, scales=scales))


def test_layers_kept_in_float_stay_float():
    model, scales = quantized()
    for node in model.graph.node:
        if node.op_type == "Conv" and node.output[0] == "layer1.0.conv1.out":
            node.input[0], node.input[1] = "pooled", "layer1.0.conv1.weight"
    unsigned = to_unsigned(canonicalize(model, scales=scales))
    assert layers_by_kind(unsigned)[1] == ["layer1.0.conv1"]
    assert (run(canonicalize(model), images(64)).argmax(1) == run(unsigned, images(64)).argmax(1)).mean() > 0.95


def test_a_bias_beyond_int32_widens_its_channels_scale():
    model = canonical()
    tensors = {t.name: t for t in model.graph.initializer}
    for name, value in (("conv1.weight.scale", 2.0**-40), ("conv1.bias", 3.0)):
        values = numpy_helper.to_array(tensors[name]).copy()
        values[5] = value
        tensors[name].CopyFrom(numpy_helper.from_array(values, name))
    wanted, found = run(model, images(64)), run(to_unsigned(model), images(64))
    assert np.abs(wanted - found).max() < 0.05 * np.abs(wanted).max()


def test_only_wide_weights_behind_the_whole_u8_range_may_saturate():
    narrow, wide = (to_unsigned(canonical(stem_limit=limit)) for limit in (63, 127))
    assert {p.key for p in narrow.metadata_props} == {SCALES_KEY}
    assert {p.key: p.value for p in wide.metadata_props}[SATURATION_KEY] == "conv1"


@pytest.mark.parametrize("dialect", [to_unsigned, to_openvino])
def test_for_vnni_nothing_is_clipped_and_the_file_says_where_others_would_overflow(dialect):
    portable, for_vnni = dialect(canonical()), dialect(canonical(), vnni=True)
    check(for_vnni)
    assert any(n.op_type == "Clip" for n in portable.graph.node)
    assert not any(n.op_type == "Clip" for n in for_vnni.graph.node)
    assert VNNI_KEY not in {p.key for p in portable.metadata_props}
    props = {p.key: p.value for p in for_vnni.metadata_props}
    assert VNNI_KEY in props
    behind_a_relu = {"layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0", "fc"}
    assert set(props[SATURATION_KEY].split(",")) == behind_a_relu  # not conv1, whose weights are guarded


@pytest.mark.parametrize("dialect", [to_unsigned, to_openvino])
def test_a_file_in_which_nothing_would_be_clipped_is_for_every_cpu(dialect):
    model, _ = quantized()
    scales = {layer: {"output": 0.1, "sum": 0.1} for layer in CONVOLUTIONS}
    for node in model.graph.node:
        node.op_type = {"Relu": "Tanh"}.get(node.op_type, node.op_type)
    portable, for_vnni = (dialect(canonicalize(model, scales=scales), vnni=vnni) for vnni in (False, True))
    assert for_vnni == portable


def with_ranges(factor):
    """The canonical network with the ranges of what follows a ReLU as many times as wide."""
    model = canonical()
    scales = {n.input[1] for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] != "normal"}
    for tensor in model.graph.initializer:
        if tensor.name in scales:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
    return model


@pytest.mark.parametrize("dialect", [to_unsigned, to_openvino])
def test_for_vnni_what_lies_within_the_ranges_is_the_same_to_the_bit(dialect):
    np.testing.assert_array_equal(*(run(dialect(with_ranges(4), vnni=vnni), images(64)) for vnni in (False, True)))


@pytest.mark.parametrize("dialect", [to_unsigned, to_openvino])
def test_for_vnni_what_lies_beyond_the_ranges_goes_on_to_twice_of_them(dialect):
    wanted = run(canonicalize(residual()), images(64))
    cut, whole = (np.abs(run(dialect(with_ranges(0.6), vnni=vnni), images(64)) - wanted).mean() for vnni in (False, True))
    assert whole < 0.8 * cut


def test_optimised_kernels_agree_with_the_reference():
    """int16 saturation on CPUs without VNNI shows here first."""
    model = to_unsigned(canonical())
    reference, fast = run(model, images(1000)), run(model, images(1000), optimise=True)
    assert (reference.argmax(1) == fast.argmax(1)).mean() >= 0.99
