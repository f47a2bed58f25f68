"""Reading layer listings. Their formats are TensorRT's as documented (inspector) and as TensorRT-RTX 1.7 was seen to log them."""

import json

import pytest

from deployopt.runtime.tensorrt_layers import Network, execution, layers_of_inspector, layers_of_log, nodes_of, precision_of

NETWORK = Network(("conv1", "conv2"), ("add",))


def inspected(kind, first_input, output, nodes, **more):
    def tensor(text):
        return {"Name": "t", "Dimensions": [8, 64, 8, 8], "Format/Datatype": text}

    return {
        "Name": nodes,
        "LayerType": kind,
        "Inputs": [tensor(first_input)],
        "Outputs": [tensor(output)],
        "Metadata": "\x1f".join(f"[ONNX Layer: {n}]" for n in nodes.split()),
        **more,
    }


def inspector(*layers, rest="Bindings"):
    return json.dumps({"Layers": list(layers), rest: ["input", "logits"]})


INT8 = "Thirty-two wide channel vectorized row major Int8 format."
HALF = "Sixteen wide channel vectorized row major FP16 format."


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
        ("N/A due to dynamic shapes", "N/A due to dynamic shapes"),
    ],
)
def test_precision_of_format_names(text, precision):
    assert precision_of(text) == precision


def test_nodes_of_metadata():
    assert nodes_of("[ONNX Layer: conv1]\x1f[ONNX Layer: layer1/relu 2]") == ("conv1", "layer1/relu 2")


@pytest.mark.parametrize("rest", ["Bindings", "I/O Tensors"])
def test_fused_int8_engine(rest):
    """Both JSON schemas: up to 10.x and from 11 on."""
    layers = layers_of_inspector(
        inspector(
            inspected("Reformat", "Row major linear FP32", INT8, "quantize"),
            inspected("CaskConvolution", INT8, INT8, "conv1", ParameterType="Convolution"),
            inspected("CaskConvolution", INT8, INT8, "conv2 add", ParameterType="Convolution"),
            rest=rest,
        )
    )
    found = execution(NETWORK, layers)
    assert (found.quantized_layers, found.quantizable_layers, found.int8_to_float) == (2, 2, 0)
    assert (found.adds, found.fused_adds) == (1, 1)


def test_a_convolution_left_in_float_is_seen():
    layers = layers_of_inspector(
        inspector(
            inspected("CaskConvolution", INT8, HALF, "conv1", ParameterType="Convolution"),
            inspected("CaskConvolution", HALF, HALF, "conv2", ParameterType="Convolution"),
            inspected("ElementWise", HALF, HALF, "add"),
        )
    )
    found = execution(NETWORK, layers)
    assert found.executed == {"int8": 1, "fp16": 1}
    assert (found.int8_to_float, found.fused_adds) == (1, 0)


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
            return ", ".join(f"{{ Name: t, Dimensions: [-1,4], Datatype: {t}, Format: (NHWC) Channel major format }}" for t in types)

        metadata = "".join(f"[ONNX Layer: {n}]" for n in nodes)
        constants = tensors(["Int8", "Float"])
        return (
            f"Name: {name}, LayerType: {kind}, Inputs: [ {tensors(inputs)}], Constants: [ {constants}], Outputs: [ {tensors(outputs)}], "
            f"TacticName: stub, StreamId: 0, Metadata: {metadata}"
        )

    listing = "\n".join(
        (
            "Layers:",
            line("quantize", "kgen", ["Float"], ["Int8"], ["input_Q", "conv1"]),
            line("conv1_myl0", "correlation", ["Int8"], ["Float"], ["conv1", "input_DQ"]),
            line("conv2_myl0", "correlation", ["Half", "Half"], ["Half"], ["conv2", "add"]),
        )
    )
    found = execution(NETWORK, layers_of_log([("INFO", "noise"), ("VERBOSE", listing)]))
    assert found.executed == {"int8": 1, "fp16": 1}
    assert (found.int8_to_float, found.fused_adds) == (1, 1)
