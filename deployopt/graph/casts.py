"""Float precision typed in the graph: FP16 or BF16 inside, FP32 inputs and outputs. One such ONNX serves every strongly typed runtime.

And back to FP32, for runtimes that lack kernels of those types.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, checker, defs, helper, numpy_helper, version_converter

from deployopt.errors import ExportFailed
from deployopt.graph import OPSET
from deployopt.graph.editing import Graph, attribute, clone, opset_of, with_shapes

_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_NARROW = frozenset(_TYPES.values())
_FLOATS = _NARROW | {TensorProto.FLOAT}
_Q_OPSET = 19  # QuantizeLinear takes FP16 and BF16 scales from here on
_BF16_OPSET = 22  # Conv, MaxPool and GlobalAveragePool take BF16 from here on; nothing else about them changed


def cast(model: ModelProto, precision: Literal["fp16", "bf16"]) -> ModelProto:
    """The model computing in FP16 or BF16, with casts at its edges only; Q/DQ stay, with scales of that type (INT8+FP16).

    BF16 raises the opset to 22, the first whose convolution takes it.

    Args:
        model: a float32 or INT8 Q/DQ model, opset ≥ 19 if it has Q/DQ.

    Raises:
        ExportFailed: a value overflows, a scale vanishes (both name the initializer), or the opset is too old.
    """
    target = _TYPES[precision]
    opset = opset_of(model)
    if opset < _Q_OPSET and any(n.op_type in ("QuantizeLinear", "DequantizeLinear") for n in model.graph.node):
        raise ExportFailed(f"INT8 with {precision.upper()} around it needs opset {_Q_OPSET} or newer, found {opset}", f"set export.opset: {OPSET}")
    model = version_converter.convert_version(model, _BF16_OPSET) if precision == "bf16" and opset < _BF16_OPSET else clone(model)
    graph = Graph(model.graph)
    scales = {n.input[1] for n in graph.nodes("QuantizeLinear", "DequantizeLinear")}
    fixed = {name for node in model.graph.node for name in _always_float(node, opset_of(model))}
    for name, tensor in _constants(model.graph):
        if name not in fixed:
            _cast_tensor(tensor, target, precision, is_scale=name in scales)
    for node in graph.nodes("Cast"):
        if attribute(node, "to", 0) == TensorProto.FLOAT and node.output[0] not in fixed:
            _cast_to(node, target)
    _cast_edges(graph, target)
    graph.finish()
    model = with_shapes(model)
    checker.check_model(model, full_check=True)
    return model


def widen(model: ModelProto) -> ModelProto:
    """The model computing in FP32 what it has in FP16 or BF16, its inputs and outputs included.

    Constants keep their values, since every FP16 and BF16 number is an FP32 one; results are no longer rounded to those types. Q/DQ stay.

    Raises:
        ExportFailed: the model's types or shapes contradict each other.
    """
    model = with_shapes(model)
    graph = model.graph
    stored, values = dict(_constants(graph)), (*graph.input, *graph.value_info, *graph.output)
    floats = {name for name, tensor in stored.items() if tensor.data_type in _FLOATS}
    floats |= {value.name for value in values if value.type.tensor_type.elem_type in _FLOATS}
    for tensor in stored.values():
        if tensor.data_type in _NARROW:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for value in values:
        if value.type.tensor_type.elem_type in _NARROW:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in Graph(graph).nodes("Cast"):
        if attribute(node, "to", 0) not in _FLOATS:
            continue
        if node.input[0] in floats:  # now from FP32 to FP32
            node.op_type = "Identity"
            del node.attribute[:]
        else:
            _cast_to(node, TensorProto.FLOAT)
    return with_shapes(model)


def _always_float(node: NodeProto, opset: int) -> Iterator[str]:
    """What a node reads in FP32 whatever the type of its data, as Resize its scales."""
    inputs = defs.get_schema(node.op_type, opset, node.domain).inputs if defs.has(node.op_type, node.domain) else ()
    yield from (name for name, formal in zip(node.input, inputs, strict=False) if formal.types == {"tensor(float)"})


def _constants(graph: GraphProto) -> Iterator[tuple[str, TensorProto]]:
    """What initializers and Constant nodes hold, by tensor."""
    yield from ((tensor.name, tensor) for tensor in graph.initializer)
    yield from ((node.output[0], held.t) for node in graph.node for held in node.attribute if held.type == AttributeProto.TENSOR)


def _cast_to(node: NodeProto, kind: int) -> None:
    next(held for held in node.attribute if held.name == "to").i = kind


def _cast_tensor(tensor: TensorProto, target: int, precision: str, *, is_scale: bool) -> None:
    if tensor.data_type != TensorProto.FLOAT:
        return
    values = numpy_helper.to_array(tensor)
    with np.errstate(over="ignore"):  # found and reported below
        narrow: NDArray[Any] = values.astype(helper.tensor_dtype_to_np_dtype(target))
    wide = narrow.astype(np.float32)
    if (np.isinf(wide) & np.isfinite(values)).any():
        raise ExportFailed(
            f"'{tensor.name}' does not fit {precision.upper()}: it holds {float(np.abs(values).max()):.4g}",
            "leave this precision out of export.precisions" + (", or use bf16" if precision == "fp16" else ""),
        )
    if is_scale and (wide[values > 0] == 0).any():
        raise ExportFailed(
            f"the scale '{tensor.name}' vanishes in {precision.upper()}: it holds {float(values[values > 0].min()):.4g}",
            "export int8 with FP32 around it",
        )
    tensor.CopyFrom(numpy_helper.from_array(narrow, tensor.name))


def _cast_edges(graph: Graph, target: int) -> None:
    for value in graph.proto.input:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT and value.name in graph.consumers:
            inner = graph.free_name(f"{value.name}.cast")
            graph.redirect(value.name, inner, list(graph.consumers[value.name]))
            graph.add_node("Cast", [value.name], [inner], inner, to=target)
    for value in graph.proto.output:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            inner = graph.free_name(f"{value.name}.typed")
            producer = graph.producers[value.name]
            graph.redirect(value.name, inner, list(graph.consumers.get(value.name, ())))
            producer.output[:] = [inner if name == value.name else name for name in producer.output]
            graph.producers[inner] = producer
            graph.add_node("Cast", [inner], [value.name], f"{value.name}.cast", to=TensorProto.FLOAT)
