"""BatchNorm folded into the convolution before it, in a captured graph."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

from deployopt.nn.placement import CONVOLUTION, norm_of, parameter_owner


def fold_batchnorm(graph_module: GraphModule) -> GraphModule:
    """Merge, in place, each BatchNorm into the convolution that it alone reads, with its running statistics.

    w' = w · γ/√(σ² + ε) and b' = (b − μ) · γ/√(σ² + ε) + β. Other BatchNorms stay. The bias is named like the convolution's own.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        norm = norm_of(node) if node.target is CONVOLUTION else None
        if norm is None:
            continue
        weight = node.args[1]
        if weight.op != "get_attr" or len(weight.users) > 1:
            continue
        name = parameter_owner(weight)
        owner = graph_module.get_submodule(name)
        owner.weight, owner.bias = _fused(graph_module, node, norm)
        with graph.inserting_before(node):
            bias = graph.get_attr(f"{name}.bias")
        node.args = (*node.args[:2], bias, *node.args[3:])
        norm.replace_all_uses_with(node)
        graph.erase_node(norm)
    graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module


def _fused(graph_module: GraphModule, convolution: Node, norm: Node) -> tuple[nn.Parameter, nn.Parameter]:
    def value(argument: object) -> Tensor | None:
        if argument is None:
            return None
        found: object = graph_module
        for part in str(cast(Node, argument).target).split("."):
            found = getattr(found, part)
        return cast(Tensor, found).detach()

    bias = convolution.args[2] if len(convolution.args) > 2 else None
    gamma, beta, mean, variance = (value(a) for a in norm.args[1:5])
    with torch.no_grad():
        return fuse_conv_bn_weights(value(convolution.args[1]), value(bias), mean, variance, norm.args[7], gamma, beta)  # type: ignore[arg-type]
