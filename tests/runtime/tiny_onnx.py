"""Small real ONNX models for tests of measuring."""

import numpy as np
import onnx
from onnx import helper, numpy_helper


def convolution(path, *, channels=8, layers=2, size=16, batch="batch", classes=10, seed=0, dtype=np.float32):
    """Convolutions on [batch, 3, size, size], global average pooling and a linear layer; returns `path`."""
    rng = np.random.default_rng(seed)
    nodes, weights, previous, width = [], [], "input", 3
    for i in range(layers):
        weights.append(numpy_helper.from_array(rng.normal(0, 0.2, (channels, width, 3, 3)).astype(dtype), f"w{i}"))
        nodes.append(helper.make_node("Conv", [previous, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
        previous, width = f"r{i}", channels
    weights.append(numpy_helper.from_array(rng.normal(0, 1, (channels, classes)).astype(dtype), "head"))
    nodes += [
        helper.make_node("GlobalAveragePool", [previous], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "head"], ["logits"]),
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", kind, [batch, 3, size, size])],
        [helper.make_tensor_value_info("logits", kind, [batch, classes])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def computing_nan(model, path):
    """The model of `convolution` with a head of NaN; returns `path`."""
    nan = onnx.load(model)
    head = next(w for w in nan.graph.initializer if w.name == "head")
    head.CopyFrom(numpy_helper.from_array(np.full(tuple(head.dims), np.nan, np.float32), "head"))
    onnx.save(nan, str(path))
    return path


def with_another_output(model, path, node_type, **attributes):
    """The model of `convolution` whose logits a further node turns into an output "other": NaN by "Sqrt" of what is negative, integers by "ArgMax";
    returns `path`."""
    both = onnx.load(model)
    both.graph.node.append(helper.make_node(node_type, ["logits"], ["other"], **attributes))
    made = onnx.TensorProto.INT64 if node_type == "ArgMax" else onnx.TensorProto.FLOAT
    both.graph.output.append(helper.make_tensor_value_info("other", made, None))
    onnx.save(both, str(path))
    return path


def sums_of_bytes(path, dtype="uint8"):
    """[batch, 3, 4, 4] of `dtype` → the sum over each image's elements [batch, 1], as floats; returns `path`."""
    nodes = [
        helper.make_node("Cast", ["input"], ["float"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"]),
        helper.make_node("ReduceSum", ["flat", "axes"], ["logits"]),
    ]
    given = helper.make_tensor_value_info("input", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), ["batch", 3, 4, 4])
    made = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 1])
    graph = helper.make_graph(nodes, "sums", [given], [made], [numpy_helper.from_array(np.array([1], np.int64), "axes")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path
