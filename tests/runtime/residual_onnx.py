"""A small real residual network as ONNX, float or with Q/DQ where our quantizer puts them, in the form torch's exporter writes."""

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from deployopt.graph.editing import PRODUCTS, Graph, layer_name, unmoved
from deployopt.runtime.session import SessionOptions

CONVOLUTIONS = ("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0")
LAYERS = len(CONVOLUTIONS) + 1  # and the head
SIZE = 16


class Builder:
    """Writes nodes; with `ranges` (largest magnitude by tensor), Q/DQ as well."""

    def __init__(self, ranges=None, stem_limit=63, seed=0):
        self.rng = np.random.default_rng(seed)
        self.ranges, self.stem_limit = ranges, stem_limit
        self.nodes, self.initializers, self.done = [], [], {}

    def constant(self, name, value):
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op_type, inputs, output, **attributes):
        self.nodes.append(helper.make_node(op_type, inputs, [output], f"node_{output}", doc_string='File "/elsewhere/model.py"', **attributes))
        return output

    def pair(self, source, scale, zero_point, axis=1):
        """QuantizeLinear and DequantizeLinear; `val_*` names, as torch gives."""
        operands = [self.constant(f"val_{source}_s", scale), self.constant(f"val_{source}_z", zero_point)]
        self.node("QuantizeLinear", [source, *operands], f"{source}_q", axis=axis)
        return self.node("DequantizeLinear", [f"{source}_q", *operands], f"{source}_dq", axis=axis)

    def activation(self, tensor):
        if self.ranges is None:
            return tensor
        if tensor not in self.done:
            self.done[tensor] = self.pair(tensor, self.scale(tensor), np.int8(0))
        return self.done[tensor]

    def scale(self, tensor):
        return np.float32(self.ranges[tensor] / 127)

    def weights(self, name, shape, gain=1.0):
        values = (self.rng.normal(0, gain * np.sqrt(2 / np.prod(shape[1:])), shape)).astype(np.float32)
        if name == "conv1":  # alike in magnitude, as edge filters are: where int16 saturates, it shows
            values = (np.sign(values) * self.rng.uniform(0.15, 0.2, shape)).astype(np.float32)
        weight, bias = self.constant(f"{name}.weight", values), self.constant(f"{name}.bias", self.rng.normal(0, 0.1, shape[0]).astype(np.float32))
        if self.ranges is None:
            return [weight, bias]
        limit = self.stem_limit if name == "conv1" else 127
        scales = (np.abs(values).max(axis=tuple(range(1, values.ndim))) / limit).astype(np.float32)
        return [self.pair(weight, scales, np.zeros(shape[0], np.int8), axis=0), bias]

    def convolution(self, name, tensor, shape, stride=1):
        pad = shape[2] // 2
        inputs = [self.activation(tensor), *self.weights(name, shape)]
        return self.node("Conv", inputs, f"{name}.out", pads=[pad] * 4, strides=[stride] * 2, kernel_shape=list(shape[2:]))

    def block(self, name, tensor, width_in, width, stride):
        first = self.node("Relu", [self.convolution(f"{name}.conv1", tensor, (width, width_in, 3, 3), stride)], f"{name}.relu")
        main = self.convolution(f"{name}.conv2", first, (width, width, 3, 3))
        shape = (width, width_in, 1, 1)
        identity = tensor if stride == 1 else self.convolution(f"{name}.downsample.0", tensor, shape, stride)
        return self.node("Relu", [self.node("Add", [main, self.activation(identity)], f"{name}.add")], f"{name}.sum")


def residual(ranges=None, stem_limit=63, seed=0):
    """[batch, 3, 16, 16] in 0–1 → [batch, 10]: normalisation, stem, pooling, two residual blocks, mean, linear layer. Opset 21."""
    b = Builder(ranges, stem_limit, seed)
    centred = b.node("Sub", ["image", b.constant("mean", np.full((1, 3, 1, 1), 0.5, np.float32))], "centred")
    normal = b.node("Div", [centred, b.constant("std", np.full((1, 3, 1, 1), 0.25, np.float32))], "normal")
    x = b.node("Relu", [b.convolution("conv1", normal, (16, 3, 3, 3))], "stem")
    x = b.node("MaxPool", [x], "pooled", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    x = b.block("layer1.0", x, 16, 16, 1)
    x = b.block("layer2.0", x, 16, 32, 2)
    x = b.node("ReduceMean", [x, b.constant("axes", np.array([-1, -2], np.int64))], "spatial_mean", keepdims=1)
    x = b.node("Reshape", [x, b.constant("shape", np.array([-1, 32], np.int64))], "flat")
    b.node("Gemm", [b.activation(x), *b.weights("fc", (10, 32), gain=2.0)], "logits", transB=1)
    graph = helper.make_graph(
        b.nodes,
        "main_graph",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        b.initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10, producer_name="pytorch", doc_string="secret path")


def images(n, seed=1):
    """float32 [n, 3, 16, 16] in 0–1: patches of 4 × 4 in contrasts that differ, so that predictions do."""
    rng = np.random.default_rng(seed)
    patches = rng.beta(0.3, 0.3, (n, 3, SIZE // 4, SIZE // 4)) * rng.random((n, 3, 1, 1))
    return patches.repeat(4, axis=2).repeat(4, axis=3).astype(np.float32)


def run(model, feed, optimise=False):
    """Logits of ONNX Runtime; without its optimisations the reference for a Q/DQ graph: every operator in float."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: feed})[0]


def calibrate(model, feed):
    """Largest magnitude of every float tensor on `feed`."""
    watched = type(model)()
    watched.CopyFrom(model)
    names = [output for node in model.graph.node for output in node.output if output != "logits"]
    watched.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    session = ort.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    return {name: float(np.abs(values).max()) for name, values in zip(names, session.run(names, {"image": feed}), strict=True)}


def quantized(stem_limit=63, seed=0):
    """(Q/DQ model, the scales that only some dialects need)."""
    ranges = calibrate(residual(seed=seed), images(64, seed=2))
    scales = {
        "conv1": {"output": ranges["stem"] / 127},
        "layer1.0.conv2": {"output": ranges["layer1.0.conv2.out"] / 127, "sum": ranges["layer1.0.sum"] / 127},
        "layer2.0.conv2": {"output": ranges["layer2.0.conv2.out"] / 127, "sum": ranges["layer2.0.sum"] / 127},
    }
    return residual(ranges, stem_limit, seed), scales


def has_constant_weight(graph, node):
    """Whether a product multiplies by a stored weight (and not two activations)."""
    tensor = node.input[1]
    while tensor in graph.producers and graph.producers[tensor].op_type in ("DequantizeLinear", "QuantizeLinear", "Transpose", "Cast", "Identity"):
        tensor = graph.producers[tensor].input[0]
    return graph.constant(tensor) is not None


def layers_by_kind(model):
    """(names of layers whose input and weight come from Q/DQ, names of the other convolutions and matrix products) of a canonical graph."""
    graph = Graph(model.graph)
    quantized, floating = [], []
    for node in graph.nodes(*PRODUCTS):
        if has_constant_weight(graph, node):
            is_int8 = all(graph.producer(unmoved(graph, name), "DequantizeLinear") is not None for name in node.input[:2])
            (quantized if is_int8 else floating).append(layer_name(graph, node))
    return quantized, floating


def check_profile(backend, artifact, precision):
    """Layers of `artifact`, profiled by the module `backend`, are told by their ONNX nodes, and the session's outputs stay. Returns the layers with weights."""
    nodes = {n.name: n.op_type for n in onnx.load(artifact.path).graph.node}
    with backend.open(artifact.path, SessionOptions(precision=precision)) as session:
        before = session.infer({"image": images(2)})["logits"]
        layers = session.profile([{"image": images(2, seed)} for seed in (1, 2)], runs=4)
        np.testing.assert_array_equal(session.infer({"image": images(2)})["logits"], before)
    told = [name for layer in layers for name in layer.nodes]
    assert set(told) <= set(nodes)
    assert sum(nodes[name] in {"Conv", "Gemm"} for name in told) == LAYERS
    products = [layer for layer in layers if any(nodes[name] in {"Conv", "Gemm"} for name in layer.nodes)]
    assert {layer.precision for layer in products} == {precision}
    assert {layer.precision for layer in layers} >= {precision}
    assert sum(layer.time_us for layer in layers) > 0
    assert all(layer.calls == 1 and layer.kind for layer in layers)
    return products
