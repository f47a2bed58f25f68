"""What TensorRT reads: rules of every version, the dialect of RTX, and that of 8.5 and 8.6, which are older than much of ONNX.

TensorRT 10 and 11 take the canonical ONNX as it is, typed in the graph; so does RTX, but its INT8 engines are smaller for scales that are told by channel.
8.x knows opset 17 and weakly typed networks, in which builder flags (`runtime/tensorrt.py`) allow the precisions that the graph marks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, checker, helper, numpy_helper, version_converter
from onnx.version_converter import ConvertError

from deployopt.errors import ExportFailed
from deployopt.graph.casts import widen
from deployopt.graph.editing import Graph, attribute, opset_of, with_shapes

QDQ = ("QuantizeLinear", "DequantizeLinear")
OPSET_8, IR_8 = 17, 8  # onnx-tensorrt 8.6, docs/operators.md; ONNX 1.12, with which it is built, has IR version 8
_TYPED_8 = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL})


def check_quantization(graph: GraphProto) -> None:
    """Refuse Q/DQ that TensorRT rejects, or takes for something else (it reads UINT8 as INT8, with a mere warning).

    Raises:
        ExportFailed: with the first such node and the remedy.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        fault = _misread(node, constants) if node.op_type in QDQ else None
        if fault:
            raise ExportFailed(
                f"node '{node.name}' ({node.op_type}): {fault}", "quantise to symmetric INT8 with zero point 0, and leave biases in floating point"
            )


def _misread(node: NodeProto, constants: dict[str, TensorProto]) -> str | None:
    """What TensorRT would misread in a QuantizeLinear or DequantizeLinear, if anything."""
    data = constants.get(node.input[0])
    if data is not None and data.data_type == TensorProto.INT32:
        return f"'{data.name}' is INT32: TensorRT takes no quantised bias"
    zero_point = constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    typed = attribute(node, "output_dtype", 0)
    # ONNX: without a zero point and output_dtype, QuantizeLinear makes UINT8
    unsigned_by_default = node.op_type == "QuantizeLinear" and zero_point is None and not typed
    types = {tensor.data_type for tensor in (data, zero_point) if tensor is not None} | {typed}
    if unsigned_by_default or TensorProto.UINT8 in types:
        return "quantised to UINT8, which TensorRT reads as INT8"
    if zero_point is not None and numpy_helper.to_array(zero_point).any():
        return f"zero point '{zero_point.name}' is not 0"
    return None


def to_rtx(model: ModelProto) -> ModelProto:
    """The dialect of TensorRT-RTX: each feature map [N, C, H, W] is quantised with its one scale told C times, so the integers are the same.

    RTX quantises in a kernel behind each convolution, and its engine holds a kernel's source, some 130 kB, once for all convolutions of equal shape only
    if their scales are arrays: a scalar makes it a kernel of its own (found in engines of TensorRT-RTX 1.7; `benchmarks/rtx_size.py` tells the sizes).
    The DequantizeLinear before a convolution keeps its scalar, which INT8 convolutions want.

    Args:
        model: a canonical model. A float one is returned without a change.
    """
    model = with_shapes(model)
    graph = Graph(model.graph)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*model.graph.input, *model.graph.value_info)}
    for quantizer in graph.nodes("QuantizeLinear"):
        shape = shapes.get(quantizer.input[0], [])
        if len(shape) == 4 and shape[1]:
            _spread(graph, quantizer, shape[1])
    graph.finish()
    checker.check_model(model, full_check=True)
    return model


def _spread(graph: Graph, quantizer: NodeProto, channels: int) -> None:
    """Scale and zero point of a QuantizeLinear as arrays [C] of one value, if they are stored scalars."""
    for position, name in enumerate(quantizer.input[1:], start=1):
        value = graph.constant(name)
        if value is not None and value.ndim == 0:
            quantizer.input[position] = graph.add_constant(f"{name}.by_channel", np.full(channels, value))
    kept = [a for a in quantizer.attribute if a.name != "axis"]
    del quantizer.attribute[:]
    quantizer.attribute.extend([*kept, helper.make_attribute("axis", 1)])


def to_tensorrt8(model: ModelProto) -> ModelProto:
    """The dialect of TensorRT 8.5 and 8.6: opset 17, INT8 weights as FP32 ones behind a Q/DQ pair, FP32 scales.

    INT8 graphs are FP32 in all that is not INT8, also those typed FP16: 8.x takes no FP16 scales. Its FP16 builder flag then makes of it what
    the types said. A float graph keeps its types.

    Args:
        model: a canonical model of fp32, fp16, int8 or int8_fp16.

    Raises:
        ExportFailed: something in it has no such form (names the node or tensor).
    """
    quantized = any(node.op_type in QDQ for node in model.graph.node)
    model = widen(model) if quantized else model
    try:
        model = version_converter.convert_version(model, min(OPSET_8, opset_of(model)))
    except (ConvertError, RuntimeError) as exc:
        raise ExportFailed(f"the graph has no form in opset {OPSET_8}, the newest that TensorRT 8.x reads: {exc}", _REMEDY) from exc
    graph = Graph(model.graph)
    if quantized:
        _requantize_weights(graph)
    graph.finish()
    model.ir_version = IR_8
    model = with_shapes(model)
    checker.check_model(model, full_check=True)
    check_tensorrt8(model)
    return model


def _requantize_weights(graph: Graph) -> None:
    """INT8 initializer → DQ becomes FP32 initializer → Q → DQ, by which the same integers come out: q · s rounds to q in steps of s."""
    for dequantizer in graph.nodes("DequantizeLinear"):
        values, scale = graph.constant(dequantizer.input[0]), graph.constant(dequantizer.input[1])
        if values is None or scale is None:
            continue
        name, axis = dequantizer.input[0], attribute(dequantizer, "axis", 1)
        shape = [-1 if i == axis % values.ndim else 1 for i in range(values.ndim)] if scale.size > 1 else []
        weight = graph.initializers.pop(name)
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float32) * scale.reshape(shape), name))
        graph.initializers[name] = weight
        quantized = graph.free_name(f"{name}.quantized")
        graph.add_node("QuantizeLinear", [name, *dequantizer.input[1:]], [quantized], quantized, axis=axis)
        graph.redirect(name, quantized, [dequantizer])


def check_tensorrt8(model: ModelProto) -> None:
    """Refuse what TensorRT 8.5 and 8.6 reject or misread, all of it at once.

    Raises:
        ExportFailed: with each fault.
    """
    check_quantization(model.graph)
    graph = Graph(model.graph)
    faults = [fault for rule in _RULES_8 for fault in rule(model, graph)]
    if faults:
        raise ExportFailed(f"TensorRT 8.x cannot read this graph: {'; '.join(faults)}", _REMEDY)


def _old_opset(model: ModelProto, graph: Graph) -> Iterator[str]:
    if opset_of(model) > OPSET_8:
        yield f"it is of opset {opset_of(model)}; 8.x reads {OPSET_8} and older"
    if model.ir_version > IR_8:
        yield f"it is of IR version {model.ir_version}; 8.x reads {IR_8} and older"


def _known_types(model: ModelProto, graph: Graph) -> Iterator[str]:
    for tensor in model.graph.initializer:
        if tensor.data_type not in _TYPED_8:
            yield f"'{tensor.name}' is {TensorProto.DataType.Name(tensor.data_type)}, which 8.x lacks"


def _float_scales(model: ModelProto, graph: Graph) -> Iterator[str]:
    for node in graph.nodes(*QDQ):
        scale = graph.constant(node.input[1])
        if scale is None or scale.dtype != np.float32:
            yield f"the scale of '{node.name}' is {'computed' if scale is None else scale.dtype}; 8.x reads constant float32"


def _weights_behind_pairs(model: ModelProto, graph: Graph) -> Iterator[str]:
    for node in graph.nodes("DequantizeLinear"):
        if graph.producer(node.input[0], "QuantizeLinear") is None:
            yield f"'{node.input[0]}' is stored as integers behind a lone DequantizeLinear; 8.x wants a float weight behind a Q/DQ pair"


def _zero_points(model: ModelProto, graph: Graph) -> Iterator[str]:
    for node in graph.nodes(*QDQ):
        zero_point = graph.constant(node.input[2]) if len(node.input) > 2 else None
        if zero_point is None or zero_point.dtype != np.int8:
            yield f"'{node.name}' has no constant INT8 zero point"


def _reduced_axes(model: ModelProto, graph: Graph) -> Iterator[str]:
    for node in model.graph.node:
        if node.op_type.startswith("Reduce") and len(node.input) > 1:
            yield f"'{node.name}' ({node.op_type}) takes its axes as an input, for which 8.x would reduce over all axes, the batch included"


_Rule = Callable[[ModelProto, Graph], Iterator[str]]
_RULES_8: tuple[_Rule, ...] = (_old_opset, _known_types, _float_scales, _weights_behind_pairs, _zero_points, _reduced_axes)
_REMEDY = "change the model there, or deploy with TensorRT 10 or later"
