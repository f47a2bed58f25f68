"""Canonical INT8 (TensorRT's Q/DQ placement) → what other runtimes run fastest. The same integers, told differently, as far as the observed ranges go."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, checker, helper

from deployopt.errors import ExportFailed
from deployopt.graph.canonical import Scales, stored_scales
from deployopt.graph.editing import PRODUCTS, TRANSPARENT, Graph, attribute, clone, dequantizer_of, layer_name, unmoved, with_shapes
from deployopt.runtime.saturation import SATURATION_KEY, VNNI_KEY

_PAIR_SAFE = 64  # 2 · 255 · 64 < 2^15: a pair of products of x86's vpmaddubsw fits int16
_POOLING = ("GlobalAveragePool", "AveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax")
_SIGN_KEEPING = frozenset({*TRANSPARENT, *_POOLING, "QuantizeLinear", "DequantizeLinear"})
_CARRYING = (*TRANSPARENT, "Slice", "Pad")  # ONNX Runtime lets a DequantizeLinear change places with these
_BIAS_LIMIT = 2**30  # leaves as much of the int32 accumulator to the products


def to_unsigned(model: ModelProto, *, vnni: bool = False) -> ModelProto:
    """The dialect of ONNX Runtime on x86 CPUs: u8 activations, s8 weights, int32 biases, Q/DQ around every Add and pooling.

    Activations keep their signed scale; the zero point becomes 0 where a tensor cannot be negative (then a ReLU fuses) and 128 elsewhere, so the
    integers are those of the signed graph (with `vnni` within the observed ranges).

    Args:
        model: canonical INT8, with the scales "output" of each convolution before an Add and "sum" of an Add that no layer reads.
        vnni: for CPUs with VNNI, whose sums of products cannot overflow. Others need activations that end at 127 steps, as in the signed graph; for these
            what exceeds the observed range goes on to 255 steps, as its type has it, and no kernel has to clip it.

    Raises:
        ExportFailed: a scale is missing; names the layer.
    """
    return keep_float_weights(_for_x86(model, float_sums=False, vnni=vnni))


def to_openvino(model: ModelProto, *, vnni: bool = False) -> ModelProto:
    """The dialect of OpenVINO on CPUs: as `to_unsigned`, less what its convolutions compute in float between int32 sums and INT8 results anyway.

    They add biases and the other operand of an Add in float, without rounding in between, whether or not the graph has it there: int32 biases and
    Q/DQ of a convolution's result before an Add would save no time and only take the results away from those of training. What may be negative
    stays s8, which OpenVINO adds and convolves without a shift by a zero point.

    A graph that joins feature maps (Concat) is told as by `to_unsigned`: behind a Concat OpenVINO 2026.4 computes s8 integers, and u8 ones that a Clip of
    floats limits, wrongly (by a sixth to a third of the outputs' range in DenseNet-, Inception- and U-Net-like blocks, on AVX2).

    Args:
        model: canonical INT8, with the scale "sum" of an Add that no layer reads; with a Concat what `to_unsigned` needs.
        vnni: as of `to_unsigned`.

    Raises:
        ExportFailed: a scale is missing; names the layer.
    """
    return _for_x86(model, float_sums=not any(node.op_type == "Concat" for node in model.graph.node), vnni=vnni)


def _for_x86(model: ModelProto, *, float_sums: bool, vnni: bool) -> ModelProto:
    """Canonical INT8 with unsigned activations, pooling on integers, and the layers that may saturate named in its metadata.

    Args:
        float_sums: the runtime adds to a convolution's int32 sums in float, before it rounds; else what it adds has to be integers too.
    """
    model = clone(model)
    graph = Graph(model.graph)
    trained = graph.nodes("QuantizeLinear")
    quantize_outputs(graph, stored_scales(model), adds_fuse=float_sums)
    make_unsigned(graph, keep_signed=float_sums)
    limited = [q for q in trained if _from_zero(graph, q)]
    clipped = [] if vnni else limited
    if not float_sums:
        clip_integers(graph, clipped)
        quantize_biases(graph)
    saturating = saturating_layers(graph, clipped=not vnni)
    hoist_quantizers(graph)
    if float_sums:
        clip_before_rounding(graph, clipped)
    graph.finish()
    props = {p.key: p.value for p in model.metadata_props}
    if saturating:
        props[SATURATION_KEY] = ",".join(saturating)
    if vnni and limited:
        props[VNNI_KEY] = "required"
    helper.set_model_props(model, props)
    model = with_shapes(model)
    checker.check_model(model, full_check=True)
    return model


def quantize_outputs(graph: Graph, scales: Scales, *, adds_fuse: bool) -> None:
    """Q/DQ after every INT8 convolution and Add whose result some reader (an Add, the pooling, a layer kept in float) would take as a float.

    An Add that follows no convolution directly, or one that another Add follows too, stays in float: it fuses with none, and no range of it is observed
    (`nn.placement`).
    A result that is quantised for another reader already gets no second pair. No integer weights meet the new integers, so those of zero point 0 may use
    all 255 steps; not before pooling by the maximum, where a trained quantiser may follow that needs its own steps.

    Args:
        scales: as `canonicalize` stores them. An Add's are kept with the layer it follows: the operand that is not the quantised identity.
        adds_fuse: leave the result of a convolution that only an Add with a quantised operand reads, as the convolution's kernel adds that itself.
    """
    followed = {add.output[0]: graph.producers[name] for add in graph.nodes("Add") for name in add.input if _made_for_one_add(graph, name)}
    for node in graph.nodes("Conv", "Add"):
        if not _in_int8(graph, node) or (node.op_type == "Add" and node.output[0] not in followed):
            continue  # kept in float (mixed precision), a normalisation, or a sum of what is activated already
        if adds_fuse and node.op_type == "Conv" and _left_to_add(graph, node):
            continue
        result = _through_relu(graph, node.output[0])
        readers = graph.consumers.get(result, [])
        floating = [reader for reader in readers if not _keeps(graph, reader)]
        quantized = next((reader.output[0] for reader in readers if reader.op_type == "QuantizeLinear"), None)
        if floating and quantized is not None:
            graph.redirect(result, graph.consumers[quantized][0].output[0], floating)
        elif floating:
            layer, role = (followed[node.output[0]], "sum") if node.op_type == "Add" else (node, "output")
            scale = _observed(scales, layer_name(graph, layer), role)
            if is_non_negative(graph, result) and not any(reader.op_type in TRANSPARENT for reader in floating):
                scale = np.float32(scale * 127 / 255)
            graph.redirect(result, _add_pair(graph, result, scale), floating)


def _made_for_one_add(graph: Graph, tensor: str) -> bool:
    """Whether a tensor is a convolution's result that exactly one Add reads."""
    return graph.producer(tensor, "Conv") is not None and sum(reader.op_type == "Add" for reader in graph.consumers[tensor]) == 1


def _in_int8(graph: Graph, node: NodeProto) -> bool:
    """Whether an INT8 kernel computes a convolution or Add: its operands are quantised, or one is a convolution's that this kernel fuses with."""

    def is_fused(operand: str) -> bool:
        maker = graph.producer(operand, "Conv")
        return node.op_type == "Add" and maker is not None and _in_int8(graph, maker)

    return all(dequantizer_of(graph, operand) is not None or is_fused(operand) for operand in node.input[:2])


def _left_to_add(graph: Graph, conv: NodeProto) -> bool:
    """Whether nothing but an Add with a quantised operand reads a convolution's result."""
    readers = graph.consumers.get(conv.output[0], [])
    return len(readers) == 1 and readers[0].op_type == "Add" and any(dequantizer_of(graph, name) for name in readers[0].input)


def _through_relu(graph: Graph, tensor: str) -> str:
    """The tensor after a ReLU that alone reads this one, else the tensor itself."""
    readers = graph.consumers.get(tensor, [])
    fused = len(readers) == 1 and readers[0].op_type in ("Relu", "Clip") and tensor not in graph.outputs
    return readers[0].output[0] if fused else tensor


def _keeps(graph: Graph, reader: NodeProto) -> bool:
    """Whether a reader quantises what it reads, so that an INT8 kernel may write it."""
    if reader.op_type in TRANSPARENT:
        return all(_keeps(graph, n) for n in graph.consumers.get(reader.output[0], ()))
    return reader.op_type == "QuantizeLinear"


def _observed(scales: Scales, layer: str, role: str) -> np.float32:
    if role not in scales.get(layer, {}):
        having = ", ".join(name for name, roles in scales.items() if role in roles) or "no layer"
        raise ExportFailed(
            f"the INT8 dialect for x86 CPUs needs the scale '{role}' of the layer '{layer}', which was not observed (stored for: {having})",
            "train it with the qat stage, or calibrate it with ptq, and export again",
        )
    return np.float32(scales[layer][role])


def _add_pair(graph: Graph, tensor: str, scale: np.float32) -> str:
    scale_name = graph.add_constant(f"{tensor}.scale", scale)
    zero = graph.add_constant(f"{tensor}.zero_point", np.int8(0))
    quantized, dequantized = graph.free_name(f"{tensor}.quantized"), graph.free_name(f"{tensor}.dequantized")
    graph.add_node("QuantizeLinear", [tensor, scale_name, zero], [quantized], quantized)
    graph.add_node("DequantizeLinear", [quantized, scale_name, zero], [dequantized], dequantized)
    return dequantized


def is_non_negative(graph: Graph, tensor: str) -> bool:
    """Whether a tensor provably holds no negative value: after a ReLU (or Clip from 0) or Sigmoid, through pooling, means, reshaping, Q/DQ, sums and
    concatenations of such.

    It has to say what `nn.placement` said before training, which left weights behind such a tensor unguarded: a test holds both to each other.
    """
    node = graph.producers.get(tensor)
    while node is not None and node.op_type in _SIGN_KEEPING:
        node = graph.producers.get(node.input[0])
    if node is None:
        return False
    if node.op_type in ("Add", "Concat"):
        return all(is_non_negative(graph, name) for name in node.input)
    if node.op_type == "Clip" and len(node.input) > 1:
        low = graph.constant(node.input[1])
        return low is not None and bool(low >= 0)
    return node.op_type in ("Relu", "Sigmoid", "HardSigmoid", "Softmax")


def make_unsigned(graph: Graph, *, keep_signed: bool) -> None:
    """Signed symmetric activations → unsigned ones of the same scale, those that may be negative only if they are not to be kept."""
    for quantizer in graph.nodes("QuantizeLinear"):
        positive = is_non_negative(graph, quantizer.input[0])
        if keep_signed and not positive:
            continue
        zero = np.uint8(0 if positive else 128)
        name = graph.add_constant(f"{quantizer.input[1].removesuffix('.scale')}.zero_point_u8", zero)
        for node in (quantizer, *graph.consumers[quantizer.output[0]]):
            node.input[2:] = [name]


def _from_zero(graph: Graph, quantizer: NodeProto) -> bool:
    """Whether its integers are u8 of zero point 0."""
    zero = graph.constant(quantizer.input[2])
    return zero is not None and zero.dtype == np.uint8 and bool(zero == 0)


def clip_integers(graph: Graph, quantizers: Iterable[NodeProto]) -> None:
    """End u8 integers at 127, as in the signed graph and in training, not at 255: so pairs of products with ±127 weights fit int16.

    Before the QuantizeLinear, ONNX Runtime would fuse the Clip into a float convolution.
    """
    for quantizer in quantizers:
        tensor = quantizer.output[0]
        low, high = (graph.add_constant(f"{tensor}.{name}", np.uint8(value)) for name, value in (("low", 0), ("high", 127)))
        clipped = graph.free_name(f"{tensor}.clipped")
        readers = list(graph.consumers[tensor])
        graph.add_node("Clip", [tensor, low, high], [clipped], clipped)
        graph.redirect(tensor, clipped, readers)


def clip_before_rounding(graph: Graph, quantizers: Iterable[NodeProto]) -> None:
    """End what becomes u8 at 127 steps, by a Clip instead of the ReLU where nothing else reads that: the same integers as of `clip_integers`.

    OpenVINO makes the limits of its FakeQuantize of it. Behind that, a Clip of integers is another operation on each value.
    """
    for quantizer in quantizers:
        tensor, steps = quantizer.input[0], graph.constant(quantizer.input[1])
        assert steps is not None
        limits = [graph.add_constant(f"{tensor}.{name}", np.float32(value)) for name, value in (("low", 0), ("high", 127 * steps))]
        relu = graph.producer(tensor, "Relu")
        if relu is not None and graph.consumers[tensor] == [quantizer] and tensor not in graph.outputs:
            graph.replace(relu, "Clip", [relu.input[0], *limits])
        else:
            clipped = graph.free_name(f"{tensor}.clipped")
            graph.add_node("Clip", [tensor, *limits], [clipped], clipped)
            graph.redirect(tensor, clipped, [quantizer])


def quantize_biases(graph: Graph) -> None:
    """Float biases of INT8 layers → int32 with scale `s_x · s_w` and zero point 0, as the integer kernels add them.

    Where `bias / (s_x · s_w)` would not fit (a channel of almost zero weights), that channel's weights get a coarser scale, as in ONNX Runtime's
    quantisation tool.
    """
    for node in graph.nodes("Conv", "Gemm"):
        bias = graph.constant(node.input[2]) if len(node.input) == 3 else None
        x, w = (dequantizer_of(graph, name) for name in node.input[:2])
        if bias is None or x is None or w is None or bias.ndim != 1:
            continue
        x_scale, w_scale = graph.constant(x.input[1]), graph.constant(w.input[1])
        if x_scale is None or w_scale is None:
            continue
        w_scale = _widened(graph, w, np.broadcast_to(w_scale, bias.shape), np.abs(bias) / (np.float64(x_scale) * _BIAS_LIMIT))
        scale = (x_scale * w_scale).astype(np.float32)
        values = np.rint(bias.astype(np.float64) / scale).astype(np.int32)
        name = node.input[2]
        dequantized = graph.free_name(f"{name}.dequantized")
        constants = [
            graph.add_constant(f"{name}.{kind}", value)
            for kind, value in (("quantized", values), ("scale", scale), ("zero_point", np.zeros(scale.shape, np.int32)))
        ]
        graph.add_node("DequantizeLinear", constants, [dequantized], dequantized, axis=0)
        graph.redirect(name, dequantized, [node])


def _widened(graph: Graph, w: NodeProto, scale: NDArray[np.float32], least: NDArray[np.float64]) -> NDArray[np.float32]:
    """The weight's scales [C_out], none below `least`; requantises the channels concerned."""
    wide = np.maximum(scale, np.nextafter(least.astype(np.float32), np.float32(np.inf)))
    narrow = scale < least
    if not narrow.any():
        return scale
    values = graph.constant(w.input[0])
    assert values is not None
    axis = attribute(w, "axis", 1)
    shape = [-1 if i == axis % values.ndim else 1 for i in range(values.ndim)]
    ratio = np.where(narrow, scale / wide, 1.0).reshape(shape)
    w.input[0] = graph.add_constant(f"{w.input[0]}.widened", np.rint(values * ratio).astype(values.dtype))
    w.input[1] = graph.add_constant(f"{w.input[1]}.widened", wide)
    return wide


def hoist_quantizers(graph: Graph) -> None:
    """x → pool → Q → DQ becomes x → Q → DQ → pool, also for reshaping: the same values, as rounding keeps their order.

    The layer before then writes integers, a quarter of the bytes, and pooling reads them. ONNX Runtime carries the DQ on to the reader by itself.
    """
    for quantizer in graph.nodes("QuantizeLinear"):
        while (moved := _moves_alone(graph, quantizer.input[0])) and (dequantizer := _sole_dequantizer(graph, quantizer)):
            source, result = moved.input[0], moved.output[0]
            graph.redirect(dequantizer.output[0], result, list(graph.consumers.get(dequantizer.output[0], ())))
            graph.redirect(result, source, [quantizer])
            graph.redirect(source, dequantizer.output[0], [moved])


def keep_float_weights(model: ModelProto) -> ModelProto:
    """Layers with float weights behind integers read them through a DequantizeLinear of their own, with one scale per channel, all equal.

    Behind a DequantizeLinear of a single scale ONNX Runtime takes float weights for forgotten ones and quantises them too, per tensor (its
    WeightBiasQuantization, in 1.31): a layer that mixed precision keeps in float would run in INT8.
    """
    kept = clone(model)
    graph = Graph(kept.graph)
    channels = {v.name: v.type.tensor_type.shape.dim[1].dim_value for v in kept.graph.value_info if len(v.type.tensor_type.shape.dim) > 1}
    changed = False
    for layer in graph.nodes("Conv", "ConvTranspose", "Gemm"):
        dequantizer = graph.producer(unmoved(graph, layer.input[0], _CARRYING), "DequantizeLinear")
        if dequantizer is None or graph.constant(layer.input[1]) is None or not channels.get(dequantizer.input[0]):
            continue
        constants = [(name, graph.constant(name)) for name in dequantizer.input[1:]]
        own = [graph.add_constant(f"{name}.per_channel", np.full(channels[dequantizer.input[0]], value)) for name, value in constants if value is not None]
        graph.redirect(layer.input[0], _moved_alike(graph, layer.input[0], [dequantizer.input[0], *own]), [layer])
        changed = True
    if not changed:
        return model
    graph.finish()
    kept = with_shapes(kept)
    checker.check_model(kept, full_check=True)
    return kept


def _moved_alike(graph: Graph, tensor: str, dequantized: list[str]) -> str:
    """A copy of a tensor and of what moves its values, from a DequantizeLinear of these inputs on."""
    node = graph.producers[tensor]
    inputs = dequantized if node.op_type == "DequantizeLinear" else [_moved_alike(graph, node.input[0], dequantized), *node.input[1:]]
    copy = graph.free_name(f"{tensor}.per_channel")
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    graph.add_node(node.op_type, inputs, [copy], copy, **({"axis": 1} if inputs is dequantized else attributes))
    return copy


def _moves_alone(graph: Graph, tensor: str) -> NodeProto | None:
    """The node that makes a tensor, if it only moves values and they have no other reader."""
    node = graph.producers.get(tensor)
    alone = node is not None and node.op_type in TRANSPARENT and len(graph.consumers[tensor]) == 1 and tensor not in graph.outputs
    return node if alone else None


def _sole_dequantizer(graph: Graph, quantizer: NodeProto) -> NodeProto | None:
    """The only DequantizeLinear behind a quantizer, also behind the Clip of its integers."""
    readers = graph.consumers.get(quantizer.output[0], [])
    while len(readers) == 1 and readers[0].op_type == "Clip":
        readers = graph.consumers.get(readers[0].output[0], [])
    return readers[0] if len(readers) == 1 and readers[0].op_type == "DequantizeLinear" else None


def saturating_layers(graph: Graph, *, clipped: bool) -> list[str]:
    """Layers in which x86 CPUs without VNNI may saturate: inputs over the whole u8 range times weights beyond ±64 (see `runtime.saturation`).

    Args:
        clipped: inputs of zero point 0 end at 127, where two products fit.
    """
    found = []
    for node in graph.nodes(*PRODUCTS):
        x, w = (dequantizer_of(graph, name) for name in node.input[:2])
        if x is None or w is None:
            continue
        zero, weight = graph.constant(x.input[2]) if len(x.input) > 2 else None, graph.constant(w.input[0])
        whole_range = zero is not None and zero.dtype == np.uint8 and (not clipped or bool(zero > 0))
        if whole_range and weight is not None and int(np.abs(weight.astype(np.int16)).max()) > _PAIR_SAFE:
            found.append(layer_name(graph, node))
    return found
