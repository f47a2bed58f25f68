"""The canonical ONNX: one file per variant and precision, from which every runtime's dialect is made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, inliner

from deployopt.errors import ExportFailed
from deployopt.graph.editing import PRODUCTS, TRANSPARENT, Graph, attribute, clone, layer_name, with_shapes

Scales = Mapping[str, Mapping[str, float]]
SCALES_KEY = "deployopt.scales"
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
_USABLE = f"finite, positive and at least {_SMALLEST_NORMAL:.2g}, since runtimes take less for zero"
_CALIBRATE = "calibrate on more varied images: a constant tensor has no range"


def canonicalize(model: ModelProto, *, scales: Scales | None = None, metadata: Mapping[str, str] | None = None) -> ModelProto:
    """Bring what `torch.onnx.export(dynamo=True)` writes, float or with Q/DQ in TensorRT's placement, into our one form.

    Weights behind a QuantizeLinear become INT8 initializers; a mean over height and width becomes GlobalAveragePool, which TensorRT 8.x reads
    correctly; layers, scales and zero points bear their module's name; doc strings and exporter metadata, which hold paths, are dropped.

    Args:
        scales: by layer, scales of tensors that only some dialects quantise: "output" (the layer's own, before an Add) and "sum" (the Add's, after
            its ReLU). Symmetric INT8. Stored in the model.
        metadata: further entries of the model's metadata.

    Raises:
        ExportFailed: a weight or scale that is not finite and positive as it must be, scales of a layer that is not in the graph.
    """
    model = inliner.inline_local_functions(model) if model.functions else clone(model)
    _strip(model)
    model = with_shapes(model)
    graph = Graph(model.graph)
    _check_scales(graph)
    _fold_weights(graph)
    _pool_means(model, graph)
    _name_layers(graph)
    _name_scales(graph)
    graph.finish()
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)
    model.producer_name, model.producer_version = "deployopt", ""
    entries = dict(metadata or {})
    if scales is not None:
        entries[SCALES_KEY] = json.dumps(_checked(scales, graph), sort_keys=True)
    helper.set_model_props(model, entries)
    return with_shapes(model)


def stored_scales(model: ModelProto) -> dict[str, dict[str, float]]:
    """The scales a canonical model carries for dialects that need more of them; empty if none."""
    entry = next((p.value for p in model.metadata_props if p.key == SCALES_KEY), "{}")
    return {layer: dict(roles) for layer, roles in json.loads(entry).items()}


def is_usable_scale(scale: float) -> bool:
    """Whether it is finite, positive, and not so small that runtimes flush it to zero."""
    return math.isfinite(scale) and scale >= _SMALLEST_NORMAL


def _checked(scales: Scales, graph: Graph) -> dict[str, dict[str, float]]:
    layers = {layer_name(graph, n) for n in graph.nodes(*PRODUCTS)}
    for layer, roles in scales.items():
        if layer not in layers:
            raise ExportFailed(f"scales were given for the layer '{layer}', which is not in the graph (available: {', '.join(sorted(layers))})")
        for role, value in roles.items():
            if not is_usable_scale(value):
                raise ExportFailed(
                    f"the scale '{role}' of the layer '{layer}' must be {_USABLE}, found {value:g}",
                    _CALIBRATE,
                )
    return {layer: {role: float(value) for role, value in roles.items()} for layer, roles in scales.items()}


def _strip(model: ModelProto) -> None:
    """Drop doc strings and metadata of every part: torch writes stack traces with local paths there."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    for attr in (a for n in graph.node for a in n.attribute):
        attr.ClearField("doc_string")
    model.ClearField("doc_string")
    model.ClearField("metadata_props")
    graph.ClearField("value_info")


def quantize(values: NDArray[Any], scale: NDArray[Any], zero_point: NDArray[Any], axis: int) -> NDArray[Any]:
    """What QuantizeLinear computes: `saturate(round(values / scale) + zero_point)`, half to even, in float32 (ONNX operator spec, QuantizeLinear-21).

    Args:
        values: float32, any shape.
        scale: scalar, or 1-D along `axis`.
        zero_point: int8, uint8 or int32, of the scale's shape; its dtype is the result's.
    """
    shape = [-1 if i == axis % values.ndim else 1 for i in range(values.ndim)] if scale.size > 1 else []
    scale, zero = (a.reshape(shape or (1,) * values.ndim) for a in (scale.astype(np.float32), zero_point))
    limits = np.iinfo(zero_point.dtype)
    with np.errstate(over="ignore"):  # an overflow to infinity saturates
        rounded = np.rint(values.astype(np.float32) / scale).astype(np.float64) + zero
    return np.clip(rounded, limits.min, limits.max).astype(zero_point.dtype)


def _check_scales(graph: Graph) -> None:
    for node in graph.nodes("QuantizeLinear", "DequantizeLinear"):
        scale = graph.constant(node.input[1])
        unusable = [] if scale is None else [float(value) for value in scale.flat if not is_usable_scale(float(value))]
        if unusable:
            kind, remedy = ("tensor", _CALIBRATE) if graph.constant(node.input[0]) is None else ("weight", "check the weights: what is all zero has no range")
            raise ExportFailed(f"the scale of the {kind} '{node.input[0]}' must be {_USABLE}, found {unusable[0]:g}", remedy)


def _fold_weights(graph: Graph) -> None:
    for node in graph.nodes("QuantizeLinear"):
        values = graph.constant(node.input[0])
        if values is None:
            continue
        scale = graph.constant(node.input[1])
        zero = graph.constant(node.input[2]) if len(node.input) > 2 else np.zeros((), np.uint8)
        if scale is None or zero is None or attribute(node, "block_size", 0):
            raise ExportFailed(f"the weight '{node.input[0]}' is quantised with a computed or blocked scale; wanted one constant scale per channel")
        if not np.isfinite(values).all():
            raise ExportFailed(f"the weight '{node.input[0]}' holds NaN or infinite values")
        folded = graph.add_constant(f"{node.input[0]}.quantized", quantize(values, scale, np.broadcast_to(zero, scale.shape), attribute(node, "axis", 1)))
        graph.redirect(node.output[0], folded, list(graph.consumers.get(node.output[0], ())))
        _take_name(graph, folded, node)


def _take_name(graph: Graph, folded: str, quantizer: NodeProto) -> None:
    """Give the INT8 initializer the float one's name, if nothing else reads that."""
    original = quantizer.input[0]
    if original not in graph.initializers or graph.consumers[original] != [quantizer]:
        return
    graph.proto.initializer.remove(graph.initializers.pop(original))
    graph.proto.node.remove(quantizer)
    tensor = graph.initializers.pop(folded)
    tensor.name = original
    graph.initializers[original] = tensor
    graph.consumers[original] = []
    graph.redirect(folded, original, list(graph.consumers[folded]))


def _pool_means(model: ModelProto, graph: Graph) -> None:
    """ReduceMean over exactly height and width of [N, C, H, W] → GlobalAveragePool; and Reshape if it dropped the axes.

    Not Flatten: ONNX Runtime carries no DQ past it, and the head would compute in FP32.
    """
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    for node in graph.nodes("ReduceMean"):
        axes = graph.constant(node.input[1]) if len(node.input) > 1 else attribute(node, "axes", None)
        if axes is None or ranks.get(node.input[0]) != 4 or sorted(int(a) % 4 for a in np.ravel(axes)) != [2, 3]:
            continue
        pooled = node.output[0]
        if not attribute(node, "keepdims", 1):
            pooled = graph.free_name(f"{pooled}.pooled")
            shape = graph.add_constant(f"{node.name}.shape", np.array([0, -1], np.int64))  # [N, C]
            graph.add_node("Reshape", [pooled, shape], [node.output[0]], f"{node.name}.reshape")
        node.op_type, node.output[0] = "GlobalAveragePool", pooled
        graph.producers[pooled] = node
        del node.input[1:]
        del node.attribute[:]


def _name_layers(graph: Graph) -> None:
    """Name each layer's node as its module, once: engine inspectors and profilers then speak the user's names."""
    taken: set[str] = set()
    for node in graph.nodes(*PRODUCTS):
        name = layer_name(graph, node)
        if name not in taken:
            node.name = name
            taken.add(name)


def _name_scales(graph: Graph) -> None:
    """Give each Q/DQ pair a scale and zero point of its own, named after what it quantises."""
    for node in graph.nodes("DequantizeLinear"):
        quantizer = graph.producer(node.input[0], "QuantizeLinear")
        base = _purpose(graph, node) if quantizer is not None else node.input[0]
        pair = [node] if quantizer is None else [quantizer, *(n for n in graph.consumers[node.input[0]] if n.op_type == "DequantizeLinear")]
        if quantizer is not None and node is not pair[1]:
            continue  # named with the first reader
        for position, suffix in ((1, "scale"), (2, "zero_point")):
            values = graph.constant(node.input[position]) if len(node.input) > position else None
            if values is not None and node.input[position] != f"{base}.{suffix}":
                name = graph.add_constant(f"{base}.{suffix}", values)
                for member in pair:
                    member.input[position] = name


def _purpose(graph: Graph, dequantizer: NodeProto) -> str:
    """ "body.conv1.input" for what a layer reads (also through pooling and reshaping), else the quantised tensor's name."""
    waiting = list(graph.consumers.get(dequantizer.output[0], ()))
    for node in waiting:  # grows while it is walked
        if node.op_type in PRODUCTS:
            return f"{layer_name(graph, node)}.input"
        if node.op_type in TRANSPARENT:
            waiting.extend(graph.consumers.get(node.output[0], ()))
    return str(graph.producers[dequantizer.input[0]].input[0])
