"""Where quantise/dequantise pairs stand. Annotation, scale reading and rebuilding all ask `layers` and nothing else.

TensorRT's placement for a residual block, Q for a quantise/dequantise pair, (R) for a range that is recorded only:

    x ──┬── Q ── conv1 ── relu ── Q ── conv2 ──(R output)── add ── relu ──(R sum)── x'
        │                                                    │
        └── Q ── [ conv, downsample ] ────────────── Q ──────┘
                                              identity

- every Conv2d and Linear reads a quantised input and a quantised weight (per output channel);
- of a residual Add only the identity operand is quantised, so that conv2 + add + relu become one INT8 kernel. A convolution whose result several
  Adds read fuses with none of them, and they stay in float;
- a tensor that one layer reads as it is and another pooled by its maximum or reshaped, or that layers read pooled in several ways, is quantised once,
  before that: with two scales on one tensor no kernel could write integers that both readers take;
- a range is recorded for the output of each convolution and for the sum, after their ReLU: runtimes whose kernels also write INT8 (ONNX
  Runtime on x86) need those scales wherever nothing quantised reads the tensor;
- a layer kept in float (mixed precision) reads and writes floats, and so does the Add that it is the main operand of; rounded ones where it reads a
  pooled tensor that is quantised before the pooling.

A layer is known by the module path of its weight relative to the network ("body.layer1.0.conv1"), a tensor by the layer
that reads (input, identity) or makes it (output, sum): names of torch.export or torchao are never stored.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten
CONVOLUTION = aten.conv2d.default
LINEAR = aten.linear.default
BATCH_NORM = aten.batch_norm.default
ADDS = {aten.add.Tensor, aten.add_.Tensor}
RELUS = {aten.relu.default, aten.relu_.default, aten.relu6.default, aten.relu6_.default}  # those that kernels fuse
POSITIVE = RELUS | {aten.sigmoid.default, aten.sigmoid_.default, aten.hardsigmoid.default, aten.softmax.int}
MOVING = {  # values, and computing none: rounding before and after is the same. What `graph.editing.TRANSPARENT` says of ONNX
    aten.max_pool2d.default,
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.contiguous.default,
    aten.dropout.default,  # scales them in training, and is gone in the exported graph
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.feature_dropout_.default,
}
SIGN_KEEPING = MOVING | {
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_max_pool2d.default,
    operator.getitem,  # the values or the indices of that
    aten.mean.dim,
}

Role = Literal["input", "identity", "output", "sum"]
WEIGHT_LIMIT = 127
GUARDED_WEIGHT_LIMIT = 63


@dataclass(frozen=True)
class Layer:
    """A layer to quantise and the tensors around it that carry a scale.

    Attributes:
        name: module path of the weight's owner.
        node: the convolution or matrix product. Its arguments are (input, weight, bias …).
        add: the residual Add that the layer's output is the main operand of.
        quantized: role → tensor that is quantised for its consumer ("input" for `node`, "identity" for `add`), perhaps before it is pooled or reshaped.
        observed: role → tensor whose scale is recorded; some layer may quantise it too ("output" of a convolution, "sum" of its Add).
        signed_input: the input may be negative.
    """

    name: str
    node: Node
    add: Node | None = None
    quantized: dict[Role, Node] = field(default_factory=dict)
    observed: dict[Role, Node] = field(default_factory=dict)
    signed_input: bool = True

    @property
    def weight(self) -> Node:
        return cast(Node, self.node.args[1])

    def edges(self) -> Iterator[tuple[Role, Node, Node]]:
        """(role, tensor, node that reads it) of each quantised activation. While the graph is as `layers` found it."""
        for role, tensor in self.quantized.items():
            yield role, tensor, cast(Node, _reader(tensor, self.node if role == "input" else cast(Node, self.add)))

    def weight_limit(self, saturation_guard: bool) -> int:
        """Largest magnitude of the integer weights: 127, or 63 for a guarded layer whose input may be negative.

        x86 without VNNI multiplies u8 by s8 and adds neighbouring products in int16 (`vpmaddubsw`), which saturates at 32,767.
        A ReLU's output quantised symmetrically uses 0…127: 2·127·127 = 32,258 fits. An input of both signs is shifted to
        u8 around 128 and reaches 255: 2·255·127 = 64,770 saturates, 2·255·63 = 32,130 fits.
        """
        return GUARDED_WEIGHT_LIMIT if saturation_guard and self.signed_input else WEIGHT_LIMIT


def sole_user(node: Node, targets: set[object]) -> Node | None:
    """The only node that reads `node`, if it is one of `targets`."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in targets else None


def parameter_owner(node: Node) -> str:
    """Module path of a parameter's `get_attr` node."""
    return str(node.target).rpartition(".")[0]


def norm_of(convolution: Node) -> Node | None:
    """The BatchNorm that alone reads a convolution and folds into it. One without scale, shift or running statistics does not."""
    norm = sole_user(convolution, {BATCH_NORM})
    return norm if norm is not None and all(isinstance(a, Node) for a in norm.args[1:5]) else None


def layers(graph: Graph, float_layers: Collection[str] = ()) -> list[Layer]:
    """Every layer to quantise but `float_layers`, in graph order; the graph may still hold its BatchNorms.

    A weight that is computed, or that two nodes read, is left in float: it has no single module or no single input scale. So is a convolution that pads
    one side more than the other (see `nn.capture`). Runtimes count them among all layers, so that the report shows them as missing.
    """
    nodes = [n for n in graph.nodes if n.target in (CONVOLUTION, LINEAR) and _own_weight(n)]
    residuals = _residuals(graph, nodes)
    found = []
    for node in nodes:
        name = parameter_owner(node.args[1])
        if name in float_layers:
            continue
        layer = Layer(name, node, residuals.get(node, (None, None))[0], {"input": node.args[0]}, {}, not _nonnegative(node.args[0]))
        if node.target is CONVOLUTION:
            layer.observed["output"] = _activated(norm_of(node) or node)
        if node in residuals:
            add, layer.quantized["identity"] = residuals[node]
            layer.observed["sum"] = _activated(add)
        found.append(layer)
    _quantize_once(found)
    return found


def _quantize_once(found: list[Layer]) -> None:
    """Where several of the quantised tensors hold the values of one, moved, let that one be quantised instead."""
    tensors = {tensor for layer in found for tensor in layer.quantized.values()}
    holding = Counter(_unmoved(tensor) for tensor in tensors)
    for layer in found:
        layer.quantized.update({role: _unmoved(tensor) for role, tensor in layer.quantized.items() if holding[_unmoved(tensor)] > 1})


def _unmoved(node: Node) -> Node:
    """The tensor whose values this one holds, before they were moved."""
    while node.target in MOVING:
        node = cast(Node, node.args[0])
    return node


def _reader(tensor: Node, consumer: Node) -> Node | None:
    """The node that reads `tensor` where `consumer` does, or where it reads it moved; None if it does not."""
    if tensor in consumer.all_input_nodes:
        return consumer
    return next((found for node in consumer.all_input_nodes if node.target in MOVING and (found := _reader(tensor, node))), None)


def _activated(node: Node) -> Node:
    """The ReLU that alone reads a tensor, else the tensor itself."""
    return sole_user(node, cast("set[object]", RELUS)) or node


def _own_weight(node: Node) -> bool:
    weight = node.args[1]
    return isinstance(weight, Node) and weight.op == "get_attr" and len(weight.users) == 1 and str(weight.target).endswith(".weight")


def _residuals(graph: Graph, layer_nodes: list[Node]) -> dict[Node, tuple[Node, Node]]:
    """Convolution → (Add, identity operand). Of two operands made by convolutions the one behind more of them is the main path.

    Without convolutions whose results several Adds read: each of those would take it for its own, and the scales of one for another's.
    """
    depth: dict[Node, int] = {}
    for node in graph.nodes:
        depth[node] = max((depth[n] for n in node.all_input_nodes), default=0) + (node.target is CONVOLUTION)
    results = {norm_of(n) or n: n for n in layer_nodes if n.target is CONVOLUTION}
    made_by = {result: n for result, n in results.items() if sum(user.target in ADDS for user in result.users) == 1}
    found = {}
    for node in graph.nodes:
        operands = [a for a in node.args[:2] if isinstance(a, Node)]
        if node.target not in ADDS or len(operands) != 2 or operands[0] is operands[1]:
            continue
        candidates = [a for a in operands if a in made_by]
        if candidates:
            main = max(candidates, key=depth.__getitem__)
            found[made_by[main]] = node, operands[1] if main is operands[0] else operands[0]
    return found


def _nonnegative(node: Node) -> bool:
    """Whether every value is certainly ≥ 0."""
    if node.target in POSITIVE:
        return True
    if node.target in ADDS or node.target is aten.cat.default:
        operands = node.args[0] if node.target is aten.cat.default else node.args[:2]
        return all(isinstance(a, Node) and _nonnegative(a) for a in cast("tuple[object, ...]", operands))
    return node.target in SIGN_KEEPING and _nonnegative(cast(Node, node.args[0]))
