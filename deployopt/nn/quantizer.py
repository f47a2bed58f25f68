"""A quantised network from its data: scales by layer name in, a graph with quantise/dequantise operators out. No torchao here.

A lineage entry of a quantised network:

    {"op": "quantize",
     "sites": {"body.layer1.0.conv2": {"input": s, "weight": [s, …], "identity": s, "output": s}, …},
     "scheme": {"saturation_guard": true, "float_layers": ["body.conv1"], …}}

`float_layers` are kept in float (mixed precision) and have no sites.
Every s is a positive float: the real value of one integer step. Zero points are 0. Roles as in `nn.placement`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib  # noqa: F401  (registers the operators)
from torch.fx import GraphModule, Node

from deployopt.errors import ArtifactMismatch
from deployopt.graph.canonical import is_usable_scale
from deployopt.nn.capture import capture, example_input
from deployopt.nn.fold import fold_batchnorm
from deployopt.nn.placement import Layer, layers

if TYPE_CHECKING:
    from deployopt.nn.models import Network

Sites = Mapping[str, Mapping[str, Any]]
ACTIVATION_MIN, ACTIVATION_MAX = -128, 127
operators = torch.ops.quantized_decomposed


def quantization(network: Network) -> Mapping[str, Any] | None:
    """The lineage entry that quantised the network, None for a float network."""
    return next((e for e in network.lineage if e["op"] == "quantize"), None)


def float_layers(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Layers that a quantisation keeps in float."""
    return tuple(entry["scheme"].get("float_layers", ()))


def recorded_scales(network: Network, extra_float: Collection[str] = ()) -> dict[str, dict[str, float]] | None:
    """Scales that some dialects need beside those of the Q/DQ pairs: "output" and "sum", by layer; None for a float network."""
    entry = quantization(network)
    if entry is None:
        return None
    kept = {
        name: {role: scale for role, scale in site.items() if role in ("output", "sum")} for name, site in entry["sites"].items() if name not in extra_float
    }
    return {name: roles for name, roles in kept.items() if roles}


def keep_float(network: Network, names: Collection[str]) -> None:
    """Take layers out of the network's quantisation; the scales of the others stay."""
    entry = next(e for e in network.lineage if e["op"] == "quantize")
    entry["scheme"]["float_layers"] = sorted({*float_layers(entry), *names})
    entry["sites"] = {name: site for name, site in entry["sites"].items() if name not in names}


def replay(network: nn.Module, entry: Mapping[str, Any]) -> None:
    """Check that a quantisation's sites fit the network. Its modules stay as they are: the scales work in `fake_quantized`.

    Raises:
        ArtifactMismatch: a layer is missing, has another number of output channels, or has a scale that is not a positive number.
    """
    modules = dict(network.named_modules())
    if unknown := set(float_layers(entry)) - modules.keys():
        raise ArtifactMismatch(f"the quantisation keeps {', '.join(sorted(unknown))} in float, which this network lacks", _remedy())
    for name, site in entry["sites"].items():
        if name not in modules:
            raise ArtifactMismatch(f"the quantisation has scales for the layer '{name}', which this network lacks", _remedy())
        wanted, found = len(cast(Tensor, modules[name].weight)), len(site["weight"])
        if wanted != found:
            raise ArtifactMismatch(f"layer '{name}' has {wanted} output channels and {found} weight scales", _remedy())
        for role, scale in site.items():
            if not all(is_usable_scale(s) for s in (scale if isinstance(scale, Sequence) else [scale])):
                raise ArtifactMismatch(f"layer '{name}' has a {role} scale that is not a positive number (and not denormal)", _remedy())


def fake_quantized(network: Network) -> GraphModule:
    """The network as runtimes see it: BatchNorm folded, weights as integers, Q/DQ operators at the sites of its lineage.

    Returns:
        A module on the CPU in eval mode, float32 [N, C, H, W] → float32 [N, K], any N. Its weights are int8 buffers: not trainable.

    Raises:
        ExportFailed: torch.export cannot trace the network.
        ArtifactMismatch: its sites are not those that the placement finds.
    """
    entry = quantization(network)
    if entry is None:
        raise ArtifactMismatch("the network was not quantised: its lineage has no 'quantize' entry", "quantise it by a qat or ptq stage")
    return insert_quantization(folded(network), entry)


def folded(network: Network) -> GraphModule:
    """The float network as runtimes see it: BatchNorm folded, on the CPU. Raises ExportFailed if torch.export cannot trace it."""
    return fold_batchnorm(capture(network, example_input(network.preprocessing)))


def insert_quantization(graph_module: GraphModule, entry: Mapping[str, Any], extra_float: Collection[str] = ()) -> GraphModule:
    """Write Q/DQ operators and integer weights into a folded graph, in place, except for the entry's float layers and `extra_float`."""
    graph, sites, saturation_guard = graph_module.graph, cast(Sites, entry["sites"]), bool(entry["scheme"]["saturation_guard"])
    found = layers(graph, {*float_layers(entry), *extra_float})
    if missing := {layer.name for layer in found} ^ (set(sites) - set(extra_float)):
        raise ArtifactMismatch(f"the scales and the network's layers differ at {', '.join(sorted(missing))}", _remedy())
    dequantized: dict[Node, Node] = {}
    for layer, edges in [(layer, list(layer.edges())) for layer in found]:
        for role, tensor, consumer in edges:
            if tensor not in dequantized:
                dequantized[tensor] = _quantize_activation(graph_module, tensor, sites[layer.name][role])
            consumer.replace_input_with(tensor, dequantized[tensor])
        _quantize_weight(graph_module, layer, sites[layer.name]["weight"], layer.weight_limit(saturation_guard))
    graph.eliminate_dead_code()
    graph.lint()
    graph_module.recompile()
    return graph_module


def _quantize_activation(graph_module: GraphModule, tensor: Node, scale: float) -> Node:
    graph, parameters = graph_module.graph, (scale, 0, ACTIVATION_MIN, ACTIVATION_MAX, torch.int8)
    with graph.inserting_after(tensor):
        quantized = graph.call_function(operators.quantize_per_tensor.default, (tensor, *parameters))
    with graph.inserting_after(quantized):
        return graph.call_function(operators.dequantize_per_tensor.default, (quantized, *parameters))


def _quantize_weight(graph_module: GraphModule, layer: Layer, scales: Sequence[float], limit: int) -> None:
    graph, owner = graph_module.graph, graph_module.get_submodule(layer.name)
    scale = torch.tensor(scales)
    zero_point = torch.zeros(len(scale), dtype=torch.int64)
    weight = operators.quantize_per_channel(cast(Tensor, owner.weight).detach(), scale, zero_point, 0, -limit, limit, torch.int8)
    del owner.weight
    for name, value in {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}.items():
        owner.register_buffer(name, value)
    with graph.inserting_before(layer.node):
        arguments = tuple(graph.get_attr(f"{layer.name}.{n}") for n in ("weight", "weight_scale", "weight_zero_point"))
        dequantized = graph.call_function(operators.dequantize_per_channel.default, (*arguments, 0, -limit, limit, torch.int8))
    layer.node.update_arg(1, dequantized)


def _remedy() -> str:
    return "quantise the network again: deployopt run RECIPE --fresh"
