"""Multiply–accumulates, counted on the exported graph."""

from __future__ import annotations

from math import prod

from onnx import ModelProto, ValueInfoProto

from deployopt.errors import ExportFailed
from deployopt.graph.editing import PRODUCTS, Graph, attribute, clone, layer_name, with_shapes


def by_node(model: ModelProto) -> dict[str, int]:
    """MACs of one sample by layer, in the graph's order; convolutions and matrix products only, as is usual.

    A convolution takes `C_out · H_out · W_out · C_in / groups · K_h · K_w` of them, a transposed one, which multiplies each element that it reads,
    `C_in · H_in · W_in · C_out / groups · K_h · K_w`, a matrix product output elements × inner length.

    Raises:
        ExportFailed: a layer whose shapes cannot be inferred.
    """
    single = clone(model)
    for value in (*single.graph.input, *single.graph.output):
        if dims := value.type.tensor_type.shape.dim:
            dims[0].dim_value = 1
    single = with_shapes(single)
    graph = Graph(single.graph)
    shapes = {v.name: _shape(v) for v in (*single.graph.value_info, *single.graph.input, *single.graph.output)}
    shapes |= {name: tuple(t.dims) for name, t in graph.initializers.items()}
    counts: dict[str, int] = {}
    for node in graph.nodes(*PRODUCTS):
        name = layer_name(graph, node)
        left, weight, result = (shapes.get(tensor, ()) for tensor in (node.input[0], node.input[1], node.output[0]))
        if not (left and weight and result) or 0 in (*left, *result):
            raise ExportFailed(f"MACs of '{name}' cannot be counted: its shapes cannot be inferred")
        inner = prod(weight[1:]) if node.op_type.startswith("Conv") else left[0 if attribute(node, "transA", 0) else -1]
        each = left if node.op_type == "ConvTranspose" else result
        counts[name] = counts.get(name, 0) + prod(each) * inner  # a shared layer runs more than once
    return counts


def _shape(value: ValueInfoProto) -> tuple[int, ...]:
    """Axis lengths; 0 for one that is not known."""
    return tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
