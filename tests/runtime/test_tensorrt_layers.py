"""Reading layer listings. Their formats are TensorRT's as documented (inspector) and as TensorRT-RTX 1.7 was seen to log them."""

import json

import pytest

from deployopt.runtime.tensorrt_layers import Network, execution, layers_of_inspector, layers_of_log, nodes_of, precision_of

NETWORK = Network(("conv1", "conv2"), ("add",))


def inspected(kind, first_input, output, nodes, reads="t", writes="u", pooled=False, split=False, **more):
    def tensor(name, text, dims):
        types = {"Format": text, "DataType": TYPES[text]} if split else {"Format/Datatype": text}
        return {"Name": name, "Location": "Device", "Dimensions": dims, **types}

    return {
        "Name": nodes,
        "LayerType": kind,
        "Inputs": [tensor(reads, first_input, [8, 64, 8, 8])],
        "Outputs": [tensor(writes, output, [8, 64, 1, 1] if pooled else [8, 64, 8, 8])],
        "Metadata": "\x1f".join(f"[ONNX Layer: {n}]" for n in nodes.split()),
        **more,
    }


def inspector(*layers, rest="Bindings"):
    return json.dumps({"Layers": list(layers), rest: ["input", "logits"]})


INT8 = "Thirty-two wide channel vectorized row major Int8 format."
HALF = "Sixteen wide channel vectorized row major FP16 format."
LINEAR = "Row major linear FP32"
TYPES = {INT8: "Int8", HALF: "Half", LINEAR: "Float"}  # 11's word for each


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        (INT8, "int8"),
        (HALF, "fp16"),
        ("Half", "fp16"),
        ("BFloat16", "bf16"),
        ("Row major linear BF16", "bf16"),
        ("Row major linear FP32", "fp32"),
        ("Float", "fp32"),
        ("FP8", "fp8"),
        ("Row major linear UInt8 format", "Row major linear UInt8 format"),
        ("N/A due to dynamic shapes", "N/A due to dynamic shapes"),
    ],
)
def test_precision_of_format_names(text, precision):
    assert precision_of(text) == precision


def test_nodes_of_metadata():
    assert nodes_of("[ONNX Layer: conv1]\x1f[ONNX Layer: layer1/relu 2]") == ("conv1", "layer1/relu 2")


@pytest.mark.parametrize(("split", "rest"), [(False, "Bindings"), (True, "I/O Tensors")])
def test_fused_int8_engine(split, rest):
    """Both JSON schemas: up to 10.x and from 11 on."""
    layers = layers_of_inspector(
        inspector(
            inspected("Reformat", LINEAR, INT8, "quantize", "input", "a", split=split),
            inspected("CaskConvolution", INT8, INT8, "conv1", "a", "b", split=split, ParameterType="Convolution"),
            inspected("CaskConvolution", INT8, INT8, "conv2 add", "b", "c", split=split, ParameterType="Convolution"),
            rest=rest,
        )
    )
    found = execution(NETWORK, layers)
    assert (found.quantized_layers, found.quantizable_layers, found.int8_to_float) == (2, 2, 0)
    assert (found.adds, found.fused_adds, found.reformats) == (1, 1, 1)


def test_control_characters_inside_strings_are_read():
    """8.6 separates a fused layer's nodes by raw U+001F and more, where JSON wants an escape."""
    text = inspector(inspected("CaskConvolution", INT8, INT8, "conv1 relu1", ParameterType="Convolution")).replace("\\u001f", "\x1f\x1e\n")
    assert "\x1e" in text
    (layer,) = layers_of_inspector(text)
    assert layer.nodes == ("conv1", "relu1")


def test_without_metadata_nodes_are_told_by_the_name_also_of_convolutions_side_by_side():
    fused = {**inspected("CaskConvolution", INT8, INT8, "", ParameterType="Convolution"), "Name": "conv1 + relu1 || conv2 + relu2"}
    del fused["Metadata"]  # 8.5 has none
    (layer,) = layers_of_inspector(inspector(fused))
    assert layer.nodes == ("conv1", "relu1", "conv2", "relu2")
    assert execution(Network(("conv1", "conv2"), ()), [layer]).executed == {"int8": 2}


@pytest.mark.parametrize("told", [{"Metadata": ""}, {}], ids=["8.6", "8.5"])
def test_a_reformat_is_of_no_node_though_its_name_tells_what_it_is_for(told):
    (layer,) = layers_of_inspector(
        json.dumps({"Layers": [{"Name": "Reformatting CopyNode for Input Tensor 0 to conv1 + relu1", "LayerType": "Reformat", **told}]})
    )
    assert layer.is_reformat
    assert layer.nodes == ()


def test_what_has_empty_metadata_is_of_no_node():
    (layer,) = layers_of_inspector(json.dumps({"Layers": [{"Name": "ShuffleHelper 1 + 2", "LayerType": "NoOp", "Metadata": ""}]}))
    assert layer.nodes == ()


def test_eleven_may_name_a_format_without_its_type():
    (layer,) = layers_of_inspector(json.dumps({"Layers": [{"Name": "conv", "Inputs": [{"Name": "x", "Format": "kCHW32", "DataType": "Int8"}]}]}))
    assert layer.inputs == ("int8",)


def test_a_convolution_left_in_float_is_seen():
    layers = layers_of_inspector(
        inspector(
            inspected("CaskConvolution", INT8, HALF, "conv1", "a", "b", ParameterType="Convolution"),
            inspected("CaskConvolution", HALF, HALF, "conv2", "b", "c", ParameterType="Convolution"),
            inspected("ElementWise", HALF, HALF, "add", "c", "d"),
        )
    )
    found = execution(NETWORK, layers)
    assert found.executed == {"int8": 1, "fp16": 1}
    assert (found.int8_to_float, found.fused_adds) == (0, 0)


def test_floats_count_where_a_kernel_quantises_them_again():
    """conv1's through an Add of its own; not those of the head, nor of a convolution that a pooling follows, though the pooled are quantised."""
    layers = layers_of_inspector(
        inspector(
            inspected("CaskConvolution", INT8, HALF, "conv1", "a", "b"),
            inspected("PointWise", HALF, HALF, "add", "b", "c"),
            inspected("Reformat", HALF, INT8, "", "c", "d"),
            inspected("CaskConvolution", INT8, HALF, "conv2", "d", "e"),
            inspected("CaskPooling", HALF, INT8, "pool", "e", "f", pooled=True),
            inspected("CaskGemm", INT8, HALF, "fc", "f", "logits", pooled=True, ParameterType="Gemm"),
            inspected("Reformat", HALF, LINEAR, "", "logits", "output"),
        )
    )
    found = execution(Network(("conv1", "conv2", "fc"), ("add",)), layers)
    assert (found.quantized_layers, found.int8_to_float, found.fused_adds, found.reformats) == (3, 1, 0, 2)
    assert found.layers == {"int8": 3, "fp16": 4}


@pytest.mark.parametrize(
    ("kind", "reads", "writes", "precision"),
    [
        ("Reformat", INT8, HALF, "fp16"),  # dequantises
        ("Reformat", HALF, INT8, "fp16"),
        ("Reformat", INT8, INT8, "int8"),
        ("CaskConvolution", INT8, HALF, "int8"),
        ("CaskConvolution", HALF, INT8, "fp16"),
    ],
)
def test_what_a_layer_computes_in(kind, reads, writes, precision):
    (layer,) = layers_of_inspector(inspector(inspected(kind, reads, writes, "node")))
    assert layer.precision == precision


@pytest.mark.parametrize(
    "text",
    [
        inspector(),
        json.dumps({"Layers": ["conv1", "conv2"]}),  # not built with DETAILED verbosity
        inspector(*(inspected("CaskConvolution", "N/A due to dynamic shapes", "N/A due to dynamic shapes", n) for n in ("conv1", "conv2"))),
    ],
)
def test_what_cannot_be_told_is_an_error(text):
    with pytest.raises(ValueError, match="no built layer tells the precision of conv1, conv2"):
        execution(NETWORK, layers_of_inspector(text))


def test_log_of_rtx_tells_a_quantizing_kernel_from_the_convolution_it_feeds():
    def line(name, kind, inputs, outputs, nodes):
        def tensors(types):
            named = [(t.partition(" ")[0], t.partition(" ")[2]) for t in types]
            return ", ".join(f"{{ Name: {n}, Dimensions: [-1,4], Datatype: {t}, Format: (NHWC) Channel major format }}" for n, t in named)

        metadata = "".join(f"[ONNX Layer: {n}]" for n in nodes)
        constants = tensors(["w Int8", "s Float"])
        return (
            f"Name: {name}, LayerType: {kind}, Inputs: [ {tensors(inputs)}], Constants: [ {constants}], Outputs: [ {tensors(outputs)}], "
            f"TacticName: stub, StreamId: 0, Metadata: {metadata}"
        )

    listing = "\n".join(
        (
            "Layers:",
            line("quantize", "kgen", ["input Float"], ["a Int8"], ["input_Q", "conv1"]),
            line("conv1_myl0", "correlation", ["a Int8"], ["b Float"], ["conv1", "input_DQ"]),
            line("quantize_2", "kgen", ["b Float"], ["c Int8"], ["relu1"]),
            line("conv2_myl0", "correlation", ["d Half", "e Half"], ["f Half"], ["conv2", "add"]),
        )
    )
    found = execution(NETWORK, layers_of_log([("INFO", "noise"), ("VERBOSE", listing)]))
    assert found.executed == {"int8": 1, "fp16": 1}
    assert (found.int8_to_float, found.fused_adds) == (1, 1)
