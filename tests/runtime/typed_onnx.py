"""A small residual network as ONNX in each precision, typed as the exporter does it."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
CHANNELS, CLASSES, SIZE = 16, 5, 8


class Graph:
    """A residual network: conv, relu, (conv, relu, conv) + identity, relu, pooling, Gemm. `precision` types it as the exporter does."""

    def __init__(self, precision):
        self.precision = precision
        self.nodes, self.constants = [], []
        self.random = np.random.default_rng(0)

    def constant(self, name, array):
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op, inputs, output, **attributes):
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{output}_{op}", **attributes))
        return output

    def floating(self, name, array):
        """A float constant in the graph's type."""
        self.constant(name, array.astype(np.float32))
        if self.precision in ("fp32", "int8"):
            return name
        return self.node("Cast", [name], f"{name}_cast", to=FLOAT_TYPES[self.precision])

    def quantized(self, x):
        if self.precision != "int8":
            return x
        scale, zero = self.constant(f"{x}_scale", np.float32(0.05)), self.constant(f"{x}_zero", np.asarray(np.int8(0)))
        return self.node("DequantizeLinear", [self.node("QuantizeLinear", [x, scale, zero], f"{x}_q"), scale, zero], f"{x}_dq")

    def weight(self, name, shape):
        array = self.random.normal(scale=0.2, size=shape).astype(np.float32)
        if self.precision != "int8":
            return self.floating(name, array)
        scale = np.abs(array).reshape(len(array), -1).max(axis=1) / 127
        integers = np.round(array / scale.reshape(-1, *[1] * (array.ndim - 1))).astype(np.int8)
        names = [self.constant(name, integers), self.constant(f"{name}_scale", scale), self.constant(f"{name}_zero", np.zeros(len(scale), np.int8))]
        return self.node("DequantizeLinear", names, f"{name}_dq", axis=0)

    def conv(self, x, output, channels_in):
        bias = self.floating(f"{output}_bias", self.random.normal(size=CHANNELS))
        return self.node("Conv", [x, self.weight(f"{output}_weight", (CHANNELS, channels_in, 3, 3)), bias], output, pads=[1, 1, 1, 1])

    def model(self):
        x = "input" if self.precision in ("fp32", "int8") else self.node("Cast", ["input"], "typed", to=FLOAT_TYPES[self.precision])
        stem = self.quantized(self.node("Relu", [self.conv(self.quantized(x), "stem", 3)], "stem_relu"))
        middle = self.quantized(self.node("Relu", [self.conv(stem, "conv1", CHANNELS)], "conv1_relu"))
        total = self.node("Add", [self.conv(middle, "conv2", CHANNELS), stem], "add")
        pooled = self.node("GlobalAveragePool", [self.node("Relu", [total], "add_relu")], "pooled")
        flat = self.quantized(self.node("Flatten", [pooled], "flat"))
        head = [flat, self.weight("fc_weight", (CLASSES, CHANNELS)), self.floating("fc_bias", self.random.normal(size=CLASSES))]
        if self.precision in ("fp32", "int8"):
            self.node("Gemm", head, "logits", transB=1)
        else:
            self.node("Cast", [self.node("Gemm", head, "typed_logits", transB=1)], "logits", to=TensorProto.FLOAT)
        tensors = (("input", ["batch", 3, SIZE, SIZE]), ("logits", ["batch", CLASSES]))
        inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name, shape in tensors)
        graph = helper.make_graph(self.nodes, "residual", inputs, outputs, self.constants)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(made)
        return made


def canonical(folder, precision):
    path = folder / f"{precision}.onnx"
    onnx.save(Graph(precision).model(), path)
    return path
