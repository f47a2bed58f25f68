"""Is this ONNX sound, and what of it is quantised?"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import ModelProto, checker, shape_inference

from deployopt.errors import ExportFailed
from deployopt.graph.editing import PRODUCTS, Graph, has_constant_weight, layer_name, unmoved, with_shapes


@dataclass(frozen=True)
class QuantizationReport:
    """What the graph asks for; what a runtime makes of it is verified from the runtime.

    Attributes:
        quantized: names of layers whose input and weight are INT8.
        floating: names of the other convolutions and matrix products.
        adds: residual Adds of two activations.
        quantized_adds: those with at least one quantised operand, as TensorRT's fusion wants.
    """

    quantized: tuple[str, ...]
    floating: tuple[str, ...]
    adds: int
    quantized_adds: int


def check(model: ModelProto) -> None:
    """onnx's full checker, strict shape inference, and a dynamic batch axis on every input and output.

    Raises:
        ExportFailed: with onnx's text or the tensor whose first axis is fixed.
    """
    try:
        checker.check_model(model, full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError) as exc:
        raise ExportFailed(f"the ONNX checker refuses the graph: {exc}") from exc
    inferred = with_shapes(model)
    names = {t.name for t in inferred.graph.initializer}
    for value in (*inferred.graph.input, *inferred.graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.name not in names and not (dims and dims[0].dim_param):
            found = [d.dim_param or d.dim_value for d in dims]
            raise ExportFailed(f"'{value.name}' must have a dynamic batch axis first, found shape {found}", "export with a named dynamic first axis")


def quantization_report(model: ModelProto) -> QuantizationReport:
    """Which layers the graph's Q/DQ make INT8."""
    graph = Graph(model.graph)
    quantized: list[str] = []
    floating: list[str] = []
    for node in graph.nodes(*PRODUCTS):
        if has_constant_weight(graph, node):
            is_int8 = all(graph.producer(unmoved(graph, name), "DequantizeLinear") is not None for name in node.input[:2])
            (quantized if is_int8 else floating).append(layer_name(graph, node))
    adds = [n for n in graph.nodes("Add") if all(graph.constant(name) is None for name in n.input)]
    pairs = [any(graph.producer(name, "DequantizeLinear") is not None for name in n.input) for n in adds]
    return QuantizationReport(tuple(quantized), tuple(floating), len(adds), sum(pairs))
