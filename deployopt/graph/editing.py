"""Finding one's way in an ONNX graph and editing it: what the other modules of this room share."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

from deployopt.errors import ExportFailed

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # the layers that carry weights
TRANSPARENT = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity")  # move values, compute none


def clone(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def with_shapes(model: ModelProto) -> ModelProto:
    """The model with every tensor's type and shape inferred anew, strictly.

    Raises:
        ExportFailed: shapes or types contradict each other; carries onnx's text, which names the node.
    """
    bare = clone(model)
    del bare.graph.value_info[:]
    try:
        return shape_inference.infer_shapes(bare, check_type=True, strict_mode=True, data_prop=True)
    except shape_inference.InferenceError as exc:
        raise ExportFailed(f"the ONNX graph's shapes or types contradict each other: {exc}") from exc


def opset_of(model: ModelProto) -> int:
    """The version of ONNX's own operators."""
    return next(int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx"))


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """A node's attribute, or ONNX's default given by the caller."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


class Graph:
    """An index over a GraphProto: who makes a tensor, who reads it, what it holds. Call `finish` after editing."""

    def __init__(self, graph: GraphProto) -> None:
        self.proto = graph
        self.producers: dict[str, NodeProto] = {}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            self._index(node)
        self.initializers = {t.name: t for t in graph.initializer}
        self.outputs = {o.name for o in graph.output}

    def _index(self, node: NodeProto) -> None:
        self.producers.update(dict.fromkeys(node.output, node))
        for name in dict.fromkeys(node.input):
            self.consumers.setdefault(name, []).append(node)

    def nodes(self, *op_types: str) -> list[NodeProto]:
        """Nodes of these types, in the graph's order; a list, so that the graph may be edited while walking it."""
        return [n for n in self.proto.node if n.op_type in op_types]

    def producer(self, tensor: str, op_type: str) -> NodeProto | None:
        """The node that makes a tensor, if it is of this type."""
        node = self.producers.get(tensor)
        return node if node is not None and node.op_type == op_type else None

    def constant(self, tensor: str) -> NDArray[Any] | None:
        """What an initializer or Constant node holds, None for a computed tensor."""
        stored = self._stored(tensor)
        return None if stored is None else numpy_helper.to_array(stored)

    def constant_dtype(self, tensor: str) -> str | None:
        """NumPy's name for the type of what `constant` gives, also where another file holds the values; None for a computed tensor."""
        stored = self._stored(tensor)
        return None if stored is None else helper.tensor_dtype_to_np_dtype(stored.data_type).name

    def _stored(self, tensor: str) -> TensorProto | None:
        node = self.producer(tensor, "Constant")
        stored: TensorProto | None = self.initializers.get(tensor) or (attribute(node, "value", None) if node is not None else None)
        return stored

    def add_node(self, op_type: str, inputs: list[str], outputs: list[str], name: str, **attributes: Any) -> NodeProto:
        self.proto.node.append(helper.make_node(op_type, inputs, outputs, name, **attributes))
        node: NodeProto = self.proto.node[-1]
        self._index(node)
        return node

    def replace(self, node: NodeProto, op_type: str, inputs: list[str]) -> None:
        """Let a node compute something else from other inputs; its name and outputs stay, its attributes go."""
        for name in dict.fromkeys(node.input):
            self.consumers[name].remove(node)
        node.op_type = op_type
        node.input[:] = inputs
        del node.attribute[:]
        self._index(node)

    def add_constant(self, name: str, value: NDArray[Any] | np.generic) -> str:
        """Store an initializer under this name, or a numbered one if it is taken; returns the name."""
        name = self.free_name(name)
        self.proto.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        self.initializers[name] = self.proto.initializer[-1]
        return name

    def free_name(self, wanted: str) -> str:
        """`wanted`, or with the first number that no tensor bears."""
        taken = self.initializers.keys() | self.producers.keys() | {i.name for i in self.proto.input}
        candidates: Iterator[str] = (wanted if i == 0 else f"{wanted}.{i}" for i in range(len(taken) + 1))
        return next(name for name in candidates if name not in taken)

    def redirect(self, old: str, new: str, readers: list[NodeProto]) -> None:
        """Let `readers` read the tensor `new` where they read `old`."""
        for node in readers:
            node.input[:] = [new if name == old else name for name in node.input]
            self.consumers[old].remove(node)
            self.consumers.setdefault(new, []).append(node)

    def finish(self) -> None:
        """Drop what nothing reads and put the nodes in topological order."""
        kept = self._reachable()
        self._sort([n for n in self.proto.node if any(o in kept for o in n.output)])
        initializers = [t for t in self.proto.initializer if t.name in kept]
        del self.proto.initializer[:]
        self.proto.initializer.extend(initializers)

    def _reachable(self) -> set[str]:
        """Every tensor that some output depends on."""
        made_by = {o: n for n in self.proto.node for o in n.output}
        kept: set[str] = set()
        waiting = [o.name for o in self.proto.output]
        while waiting:
            name = waiting.pop()
            if name not in kept:
                kept.add(name)
                waiting.extend(made_by[name].input if name in made_by else ())
        return kept

    def _sort(self, nodes: list[NodeProto]) -> None:
        made_by = {o: i for i, n in enumerate(nodes) for o in n.output}
        readers: dict[int, list[int]] = {}
        missing = []
        for i, node in enumerate(nodes):
            sources = {made_by[name] for name in node.input if name in made_by}
            missing.append(len(sources))
            for source in sources:
                readers.setdefault(source, []).append(i)
        ready = [i for i, count in enumerate(missing) if count == 0]
        for i in ready:  # grows while it is walked
            for reader in readers.get(i, ()):
                missing[reader] -= 1
                if missing[reader] == 0:
                    ready.append(reader)
        ordered = [nodes[i] for i in ready]
        fresh = GraphProto()
        fresh.node.extend(ordered)
        del self.proto.node[:]
        self.proto.node.extend(fresh.node)


def layer_name(graph: Graph, node: NodeProto) -> str:
    """The module a layer comes from: its weight initializer's name without ".weight"; else the node's name."""
    tensor = node.input[1]
    while tensor not in graph.initializers and tensor in graph.producers:
        tensor = graph.producers[tensor].input[0] if graph.producers[tensor].input else ""
    return tensor.removesuffix(".weight") if tensor.endswith(".weight") else node.name or node.output[0]


def unmoved(graph: Graph, tensor: str, through: Collection[str] = TRANSPARENT) -> str:
    """The tensor whose values this one holds, before they were pooled by their maximum, reshaped or moved about: by operators of the types `through`."""
    while (node := graph.producers.get(tensor)) is not None and node.op_type in through:
        tensor = node.input[0]
    return tensor


def dequantizer_of(graph: Graph, tensor: str) -> NodeProto | None:
    """The DequantizeLinear whose values a tensor holds, perhaps pooled by their maximum or reshaped."""
    return graph.producer(unmoved(graph, tensor), "DequantizeLinear")
