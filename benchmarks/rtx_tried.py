"""What makes an INT8 TensorRT-RTX engine smaller, and what does not: variants of the graph, of the target and of the builder's settings. Needs no GPU.

    python benchmarks/rtx_tried.py                    # some five minutes on two cores
    python benchmarks/rtx_tried.py --archs resnet20   # anew; another network's rows are kept, if they are of the same version

For each: the engine's size, how many kernels' sources it holds and how many of these differ, and how many layers run in INT8. Writes
benchmarks/results/rtx_tried.json and .md.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import _networks
import rtx_size
from onnx import ModelProto

from deployopt.backends import tensorrt_rtx
from deployopt.bench.environment import environment
from deployopt.graph.casts import cast
from deployopt.graph.editing import Graph, clone
from deployopt.nn import macs
from deployopt.nn.pruning import Rules, prune
from deployopt.runtime.tensorrt_api import Vendor
from deployopt.runtime.tensorrt_layers import execution, layers_of_log, network_of
from deployopt.runtime.tensorrt_parser import parse
from deployopt.runtime.tensorrt_vendor import clean, load_vendor, make_logger
from deployopt.runtime.tensorrt_versions import set_compute_capabilities

if TYPE_CHECKING:
    import tensorrt as api

MACS_RATIO, SIZE, CAPABILITY = 0.4, 32, "8.6"
BY_CHANNEL = "pruned INT8, scales by channel"  # what "…" stands for
_TEXT = re.compile(rb"[\t\n\r\x20-\x7e]{1000,}")
_LIBRARY_ENDS = b"/*__MYELIN_NVRTC_KGEN_BUILTINS_END__*/"  # in the source of each kernel (TensorRT-RTX 1.7)
Setting = Callable[[Vendor, "api.IBuilderConfig"], None]


@dataclass(frozen=True)
class Tried:
    """One engine: bytes, kernels' sources in it, how many of these differ, and layers that run in INT8. `failed`: why there is none."""

    arch: str
    variant: str
    size_bytes: int | None
    sources: int | None = None
    distinct: int | None = None
    quantized_layers: int | None = None
    failed: str | None = None


class Plan(NamedTuple):
    """A serialised engine, None where the builder made none, its layers in INT8, None where it lists no layers, and what was said."""

    data: bytes | None
    quantized_layers: int | None
    said: str


def build(model: ModelProto, capability: str = CAPABILITY, batch: int = 8, setting: Setting | None = None) -> Plan:
    """An engine with settings that recipes do not have."""
    trt = load_vendor("tensorrt_rtx")
    logger = make_logger(trt, verbose=True)
    builder = trt.Builder(logger)
    network, parser = parse(trt, builder, logger, model.SerializeToString(), ())
    config, profile, image = builder.create_builder_config(), builder.create_optimization_profile(), (3, SIZE, SIZE)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)
    set_compute_capabilities(trt, config, [capability])
    if setting is not None:
        setting(trt, config)
    profile.set_shape(network.get_input(0).name, *(trt.Dims([n, *image]) for n in (1, batch, batch)))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    layers = layers_of_log(logger.messages)
    quantized = execution(network_of(trt, network), layers).quantized_layers if layers else None
    del parser  # the network reads weights that it holds
    return Plan(bytes(memoryview(plan)) if plan is not None else None, quantized, clean(" ".join(logger.errors())))


def held(model: ModelProto) -> ModelProto:
    """`by_channel`'s graph with each identity input of an Add copied by a MaxPool of 1 × 1: the kernel that adds then follows no other such kernel.

    RTX shares those kernels only then, as it seems to tell them apart by all pointwise operators that lead to them. The copies take time on the GPU.
    """
    model = clone(model)
    graph = Graph(model.graph)
    for add in graph.nodes("Add"):
        for name in list(add.input):
            dequantizer = graph.producer(name, "DequantizeLinear")
            if dequantizer is None or len(graph.consumers[name]) == 1:
                continue
            quantizer, copied = graph.producers[dequantizer.input[0]], graph.free_name(f"{name}.copied")
            graph.add_node("MaxPool", [quantizer.output[0]], [copied], copied, kernel_shape=[1, 1])
            graph.add_node("DequantizeLinear", [copied, *quantizer.input[1:]], [f"{copied}.float"], f"{copied}.float", axis=1)
            graph.redirect(name, f"{copied}.float", [add])
    graph.finish()
    return model


def flag(name: str) -> Setting:
    return lambda trt, config: config.set_flag(trt.BuilderFlag.__members__[name])


def attribute(name: str, value: Callable[[Any], Any]) -> Setting:
    """The value is a function of the vendor's module, which has names that the stubs of an older version lack."""
    return lambda trt, config: setattr(config, name, value(trt))


SETTINGS: dict[str, Setting] = {
    "profiling verbosity NONE": attribute("profiling_verbosity", lambda trt: trt.ProfilingVerbosity.NONE),
    "optimisation level 0": attribute("builder_optimization_level", lambda _: 0),
    "optimisation level 5": attribute("builder_optimization_level", lambda _: 5),
    "tiling FULL": attribute("tiling_optimization_level", lambda trt: trt.TilingOptimizationLevel.FULL),
    "no auxiliary streams": attribute("max_aux_streams", lambda _: 0),
    "hardware compatibility AMPERE_PLUS": attribute("hardware_compatibility_level", lambda trt: trt.HardwareCompatibilityLevel.AMPERE_PLUS),
    **{name: flag(name) for name in ("WEIGHT_STREAMING", "EXCLUDE_LEAN_RUNTIME", "STRIP_PLAN", "REFIT")},
}


def plans(arch: str) -> Iterator[tuple[str, Plan]]:
    """(variant, engine), the references first."""
    made, images = _networks.network(arch, SIZE)
    dense = _networks.exported(made)
    yield "dense FP32", build(dense)
    yield "dense FP16", build(cast(dense, "fp16"))
    prune(made, int(MACS_RATIO * macs.count(made, made.input_shape)[1]), Rules(round_to=8))
    yield "pruned FP16", build(cast(_networks.exported(made), "fp16"))
    exported = _networks.int8(made, images)
    pruned = rtx_size.by_channel(exported)
    yield "pruned INT8", build(exported)
    yield BY_CHANNEL, build(pruned)
    yield "… identities copied by MaxPool", build(held(pruned))
    yield "… FP16 around INT8", build(rtx_size.by_channel(cast(exported, "fp16")))
    yield "… one image", build(pruned, batch=1)
    for capability in ("8.9", "12.0"):
        yield f"… compute capability {capability}", build(pruned, capability)
    for name, setting in SETTINGS.items():
        yield f"… {name}", build(pruned, setting=setting)
    yield "dense INT8, scales by channel", build(rtx_size.by_channel(_networks.int8(_networks.network(arch, SIZE)[0], images)))


def tried(arch: str, variant: str, plan: Plan) -> Tried:
    if plan.data is None:
        return Tried(arch, variant, None, failed=plan.said)
    texts = [text for text in _TEXT.findall(plan.data) if _LIBRARY_ENDS in text]
    return Tried(arch, variant, len(plan.data), len(texts), len(set(texts)), plan.quantized_layers)


def markdown(rows: list[Tried], version: str, date: str) -> str:
    lines = [
        f"TensorRT-RTX {version}, pruned to {100 * MACS_RATIO:.0f} % of the MACs, compute capability {CAPABILITY} and 1 to 8 images where not said, {date}.",
        "",
        "| network | engine | MB | to dense FP32 | sources, those that differ | layers in INT8 |",
        "|---|---|---|---|---|---|",
    ]
    dense = {row.arch: row.size_bytes for row in rows if row.variant == "dense FP32" and row.size_bytes}
    for r in rows:
        if r.size_bytes is None:
            lines.append(f"| {r.arch} | {r.variant} | none: {r.failed} | | | |")
        else:
            told = "not told" if r.quantized_layers is None else r.quantized_layers
            lines.append(
                f"| {r.arch} | {r.variant} | {r.size_bytes / 1e6:.2f} | {r.size_bytes / (dense[r.arch] or 1):.3f} | {r.sources}, {r.distinct} | {told} |"
            )
    return "\n".join([*lines, "", WHY])


WHY = """RTX 1.7 fused nothing into an INT8 convolution in any graph that was tried (with and without bias, ReLU and Add, per-tensor weights, FP16 around it,
16 to 128 channels): it writes floats, and a kernel of its own scales, adds, rectifies and quantises them. In the engine that kernel is CUDA source for the
compiler on the GPU, over 130 kB, of which all but some 5 kB are the library that comes with each. An FP32 network has three such kernels, as its convolutions
take in their ReLU and Add.

Kernels share a source if their operands are alike: equal shapes, no scalar constants (a scalar scale leaves the source only after they were compared, so texts
are stored that are the same to the byte), and no pointwise operators before them that lead to another such kernel. Scales as arrays (`rtx_size.by_channel`)
see to the first kernel of each block. The second, with the Add, follows that of the block before; a copy in between makes them alike, but costs the GPU a
kernel a block, so it is not done. No setting of the builder changed the number of sources. Whether STRIP_PLAN and REFIT build with a GPU was not tried; weights
are the smaller part.

A CIFAR ResNet has eleven or twelve kernels that differ: the first, two in each of three stages, Adds behind a downsampling, the pooling and the head. Those
alone are 1.5 MB, as much as a dense FP32 ResNet-20: 0.3 is out of reach for it with INT8 convolutions, and ResNet-110 misses it even where they share their
sources. The pruned FP16 engine of so small a network is smaller than the INT8 one.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="*", default=["resnet20", "resnet110"])
    archs = parser.parse_args().archs
    version, stored = tensorrt_rtx.probe().version, rtx_size.RESULTS / "rtx_tried.json"
    earlier = json.loads(stored.read_text()) if stored.exists() else {}
    rows = [Tried(**row) for row in earlier["rows"] if row["arch"] not in archs] if earlier.get("version") == version else []
    write(rows, version)  # without networks: what is told of the rows that there are
    for arch in archs:
        for variant, plan in plans(arch):
            rows.append(tried(arch, variant, plan))
            print(rows[-1], flush=True)
            write(rows, version)


def write(rows: list[Tried], version: str | None) -> None:
    where = environment(tensorrt_rtx.distributions)
    rtx_size.RESULTS.mkdir(exist_ok=True)
    found = {"version": version, "environment": where, "rows": [asdict(r) for r in rows]}
    (rtx_size.RESULTS / "rtx_tried.json").write_text(json.dumps(found, indent=2) + "\n")
    (rtx_size.RESULTS / "rtx_tried.md").write_text(markdown(rows, str(version), where["utc"]))


if __name__ == "__main__":
    main()
