"""Which precision an engine's layers really run in: read from the engine inspector or, without a GPU, from the verbose build log."""

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, cast

from deployopt.runtime.tensorrt_api import Vendor

if TYPE_CHECKING:
    import tensorrt as api

_TYPES = (  # of TensorRT's format strings, the first that occurs: "Row major Int8 format", "Datatype: Half", "BFloat16"
    ("int8", ("int8",)),
    ("fp8", ("fp8",)),
    ("bf16", ("bfloat16", "bf16")),
    ("fp16", ("half", "fp16")),
    ("fp32", ("float", "fp32")),
)
_JOINTS = re.compile(r" \+ | \|\| ")  # of names of fused layers: one after the other, and side by side as one ("conv1 + relu1 || conv2 + relu2")
_KNOWN = {(precision,) for precision, _ in _TYPES}
_PRODUCT_KINDS = ("convolution", "correlation", "gemm", "matrixmultiply", "matmul")  # RTX calls a convolution "correlation"


class Tensor(NamedTuple):
    """What a layer reads or writes: the vendor's name, the size of each axis as it is listed, and the precision ("int8")."""

    name: str
    shape: Tuple[str, ...]
    precision: str


class Layer(NamedTuple):
    """One layer of a built engine.

    Attributes:
        name, kind: as the vendor names them.
        reads, writes: its inputs, without constants, and outputs.
        nodes: the ONNX nodes it stands for.
    """

    name: str
    kind: str
    reads: Tuple[Tensor, ...]
    writes: Tuple[Tensor, ...]
    nodes: Tuple[str, ...]

    @property
    def inputs(self) -> Tuple[str, ...]:
        """Precisions, e.g. ("int8",)."""
        return tuple(tensor.precision for tensor in self.reads)

    @property
    def outputs(self) -> Tuple[str, ...]:
        return tuple(tensor.precision for tensor in self.writes)

    @property
    def precision(self) -> str:
        """What it computes in, "?" if it reads nothing: a product by its first input; anything else in INT8 only if it neither reads nor writes floats."""
        if self.is_product:
            return self.inputs[0] if self.inputs else "?"
        floats = [precision for precision in (*self.inputs, *self.outputs) if precision != "int8"]
        return (floats or [*self.inputs, "?"])[0]

    @property
    def is_reformat(self) -> bool:
        """A copy that changes layout or type, and computes nothing."""
        return "reformat" in self.kind.lower()

    @property
    def is_product(self) -> bool:
        """A convolution or matrix product, alone or with what was fused into it."""
        return any(kind in self.kind.lower() for kind in _PRODUCT_KINDS)


class Network(NamedTuple):
    """What the parsed network asks for: ONNX nodes of its convolutions and matrix products, and of its Adds of two activations."""

    products: Tuple[str, ...]
    adds: Tuple[str, ...]


class Execution(NamedTuple):
    """What an engine runs.

    Attributes:
        quantized_layers: convolutions and matrix products executed in INT8.
        quantizable_layers: all convolutions and matrix products of the network.
        executed: those by executed precision, e.g. {"int8": 20, "fp32": 1}.
        int8_to_float: INT8 ones that write a float which a kernel of its own quantises again, so that the quantisation is not fused.
        adds, fused_adds: Adds of two activations, and those fused into a convolution or matrix product.
        reformats: layers that only change a tensor's layout or type.
        layers: all layers of the engine by `Layer.precision`, e.g. {"int8": 24, "fp32": 3, "?": 1}.
    """

    quantized_layers: int
    quantizable_layers: int
    executed: Dict[str, int]
    int8_to_float: int
    adds: int
    fused_adds: int
    reformats: int
    layers: Dict[str, int]


def precision_of(text: str) -> str:
    """The precision in one of TensorRT's type or format names; the text itself where it names none that we know."""
    lower = text.lower()
    return next((precision for precision, words in _TYPES if any(re.search(f"(?<!u){word}", lower) for word in words)), text)  # UINT8 is none of them


def nodes_of(metadata: str) -> Tuple[str, ...]:
    """ONNX nodes in a layer's metadata: "[ONNX Layer: conv1][ONNX Layer: relu1]"."""
    return tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", metadata))


def network_of(trt: Vendor, network: "api.INetworkDefinition") -> Network:
    """The convolutions, matrix products and Adds of a parsed network (`INetworkDefinition`)."""
    kinds = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "FULLY_CONNECTED")  # the last: 8.x only
    wanted = {getattr(trt.LayerType, kind) for kind in kinds if hasattr(trt.LayerType, kind)}
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    products = [_node_of(layer) for layer in layers if layer.type in wanted]
    adds = []
    for layer in layers:
        node = _node_of(layer)
        if layer.type != trt.LayerType.ELEMENTWISE or node in products:  # a Gemm's bias is an Add of that Gemm's node
            continue
        layer.__class__ = trt.IElementWiseLayer  # get_layer returns the base class; this is the vendor's way to the derived one
        if cast("api.IElementWiseLayer", layer).op == trt.ElementWiseOperation.SUM:
            adds.append(node)
    return Network(tuple(products), tuple(adds))


def _node_of(layer: "api.ILayer") -> str:
    """The ONNX node that a layer of a parsed network stands for: by its metadata, in 8.5, which has none, by its name."""
    return str((nodes_of(getattr(layer, "metadata", "")) or (layer.name,))[0])


def layers_of_log(messages: Iterable[Tuple[str, str]]) -> List[Layer]:
    """Layers as a build with a VERBOSE logger and DETAILED profiling verbosity lists them (TensorRT-RTX 1.x).

    A line each: "Name: …, LayerType: …, Inputs: [ { …, Datatype: Int8, … } ], Constants: […], Outputs: […], TacticName: …, Metadata: …".
    It is the only look inside an engine on a machine that cannot deserialise it.
    """
    layers = []
    for _, text in messages:
        for line in text.splitlines() if "LayerType: " in text else ():
            head, found, rest = line.partition(", LayerType: ")
            if not found or not head.startswith("Name: "):
                continue
            kind, _, rest = rest.partition(", Inputs: [")
            before, _, after = rest.partition(", Outputs: [")
            inputs = before.partition(", Constants: [")[0]
            outputs, _, tail = after.partition("], TacticName: ")
            layers.append(Layer(head[len("Name: ") :], kind, _tensors_of_log(inputs), _tensors_of_log(outputs), nodes_of(tail)))
    return layers


def _tensors_of_log(text: str) -> Tuple[Tensor, ...]:
    found = re.findall(r"Name: ([^,]*), Dimensions: \[([^\]]*)\],[^{}]*?Datatype: (\w+)", text)
    return tuple(Tensor(name, tuple(shape.split(",")), precision_of(dtype)) for name, shape, dtype in found)


def layers_of_inspector(text: str) -> List[Layer]:
    """Layers of `IEngineInspector.get_engine_information(JSON)` of an engine built with DETAILED profiling verbosity.

    8.6 writes control characters into strings as they are (https://github.com/NVIDIA/TensorRT/issues/2779).
    """
    return [_layer_of_json(entry) for entry in json.loads(text, strict=False).get("Layers", []) if isinstance(entry, dict)]


def _layer_of_json(entry: Mapping[str, Any]) -> Layer:
    def tensors(key: str) -> Tuple[Tensor, ...]:
        return tuple(Tensor(str(t.get("Name", "?")), tuple(map(str, t.get("Dimensions", ()))), _precision_of_json(t)) for t in entry.get(key, ()))

    name, kind = str(entry.get("Name", "?")), str(entry.get("ParameterType") or entry.get("LayerType") or "?")
    layer = Layer(name, kind, tensors("Inputs"), tensors("Outputs"), nodes_of(str(entry.get("Metadata", ""))))
    if "Metadata" in entry or layer.is_reformat:  # a reformat's name only says beside which layers it stands
        return layer
    return layer._replace(nodes=tuple(_JOINTS.split(name)))  # 8.5 has no metadata


def _precision_of_json(tensor: Mapping[str, Any]) -> str:
    """Up to 10.x one field tells format and type; 11 split it in two (NVIDIA's migration guide from 10.x to 11.x, IEngineInspector)."""
    return precision_of(str(next((tensor[key] for key in ("DataType", "Datatype", "Format/Datatype", "Format") if key in tensor), "?")))


def execution(network: Network, layers: Sequence[Layer]) -> Execution:
    """What the built layers make of the network.

    Raises:
        ValueError: no listed layer tells the precision of some convolution or matrix product.
    """
    runners = [(node, _runner(node, layers)) for node in network.products]
    missing = [node for node, layer in runners if layer is None or layer.inputs[:1] not in _KNOWN]
    if missing:
        raise ValueError(f"no built layer tells the precision of {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''} ({len(layers)} layers listed)")
    found = [layer for _, layer in runners if layer is not None]
    executed = dict(Counter(layer.inputs[0] for layer in found))
    fused = {node for layer in layers if layer.is_product for node in layer.nodes}
    return Execution(
        executed.get("int8", 0),
        len(found),
        executed,
        sum(layer.inputs[0] == "int8" and _is_quantized_again(layer, layers) for layer in found),
        len(network.adds),
        sum(node in fused for node in network.adds),
        sum(layer.is_reformat for layer in layers),
        dict(Counter(layer.precision for layer in layers)),
    )


def _is_quantized_again(layer: Layer, layers: Sequence[Layer]) -> bool:
    """Whether a float that a layer writes becomes INT8 outside of any product, at once or after steps that keep its shape.

    The result of the network's head and what a pooling reads are rightly floats.
    """
    waiting, seen = [tensor for tensor in layer.writes if tensor.precision != "int8"], {layer}
    while waiting:
        tensor = waiting.pop()
        for reader in layers:
            if reader in seen or reader.is_product or tensor.name not in [read.name for read in reader.reads]:
                continue
            seen.add(reader)
            kept = [written for written in reader.writes if written.shape == tensor.shape]
            if any(written.precision == "int8" for written in kept):
                return True
            waiting += kept
    return False


def _runner(node: str, layers: Sequence[Layer]) -> Optional[Layer]:
    """The layer that computes a node; a kernel that only quantises its input may name the node too, so products go first."""
    naming = [layer for layer in layers if node in layer.nodes]
    return next((layer for layer in naming if layer.is_product), naming[-1] if naming else None)
