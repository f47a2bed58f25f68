"""Which nodes of an ONNX file a runtime's executed layers stand for. A nameless node is called by its first output."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence

from onnx import GraphProto, NodeProto

from deployopt.graph.editing import PRODUCTS

_MADE_UNIQUE, _LAYOUT = re.compile(r"_token_\d+$"), re.compile(r"_nchwc$")  # what ONNX Runtime appends to the names it derives


def of_names(graph: GraphProto, layers: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Nodes behind the names that OpenVINO gives what it fused into each layer.

    It names operators after ONNX nodes, the last of a node's after the tensor it makes, helpers as "NODE/…", and others as it likes: the last are left out.
    """
    known = _Nodes(graph)
    return [known.described({node for name in names if (node := known.beginning(name)) is not None}) for names in layers]


def of_optimized(graph: GraphProto, optimized: GraphProto) -> list[tuple[str, ...]]:
    """Nodes behind each node of ONNX Runtime's optimised graph; () for one that only changes the layout.

    An optimised node is called after one of those it replaces, or after the tensor of one ("relu_1_nchwc"), or makes the same tensor. The others
    that it replaces lie before that one, up to a convolution or matrix product, or behind it: what no optimised node is called after was
    fused into the last to run of those that make its inputs, for only that one has them all.
    """
    known = _Nodes(graph)
    owner: dict[int, int] = {}
    for position, name in enumerate(node.name for node in optimized.node):
        anchor = known.called(_LAYOUT.sub("", _MADE_UNIQUE.sub("", name)))
        if anchor is not None:
            owner.setdefault(anchor, position)
    for position, outputs in enumerate(node.output for node in optimized.node):
        if position not in owner.values():
            made = [known.producers[tensor] for tensor in outputs if tensor in known.producers]
            owner.update({node: position for node in made if node not in owner})
    for anchor, position in list(owner.items()):
        owner.update(dict.fromkeys(known.up_to_product(anchor, owner), position))
    for index, node in enumerate(graph.node):
        makers = [owner[known.producers[tensor]] for tensor in node.input if known.producers.get(tensor) in owner]
        if index not in owner and makers:
            owner[index] = max(makers)
    return [known.described({node for node, by in owner.items() if by == position}) for position in range(len(optimized.node))]


class _Nodes:
    """A graph's nodes by name and by the tensors they make."""

    def __init__(self, graph: GraphProto) -> None:
        self.nodes: Sequence[NodeProto] = list(graph.node)
        self.producers = {tensor: index for index, node in enumerate(self.nodes) for tensor in node.output}
        self._names = {node.name: index for index, node in enumerate(self.nodes) if node.name}

    def called(self, name: str) -> int | None:
        """The node of that name, or that makes the tensor of that name."""
        return self._names.get(name, self.producers.get(name))

    def beginning(self, name: str) -> int | None:
        """As `called`, for the longest part of the name that ends before a "/"."""
        while (found := self.called(name)) is None and "/" in name:
            name = name.rpartition("/")[0]
        return found

    def up_to_product(self, anchor: int, taken: Container[int]) -> list[int]:
        """The nodes before `anchor` along first inputs up to its product, [] if there is none before a node that is taken."""
        before: list[int] = []
        node = anchor
        while self.nodes[node].op_type not in PRODUCTS:  # what the nodes around are fused into
            earlier = self.producers.get(self.nodes[node].input[0]) if self.nodes[node].input else None
            if earlier is None or earlier in taken:
                return []
            before.append(earlier)
            node = earlier
        return before

    def described(self, nodes: set[int]) -> tuple[str, ...]:
        """Names in the graph's order; of Q/DQ only where there is nothing else, for fused into a layer they only tell its scales."""
        for left_out in (("QuantizeLinear", "DequantizeLinear"), ("DequantizeLinear",), ()):
            if kept := [index for index in sorted(nodes) if self.nodes[index].op_type not in left_out]:
                return tuple(self.nodes[index].name or self.nodes[index].output[0] for index in kept)
        return ()
