"""Does a pruned INT8 TensorRT-RTX engine build for every ResNet, and how small is it beside the dense FP32 one? Needs no GPU.

    python benchmarks/rtx_size.py                            # about twenty minutes on two cores
    python benchmarks/rtx_size.py --archs resnet18 resnet20  # these anew; what else was measured under the same settings is kept

Weights are random: they change neither whether an engine builds nor its size. An engine holds weights and, for each kernel that is compiled on the GPU
later, its source with the library of functions that it uses: over 130 kB for each kernel that quantises, which is most of a small INT8 network's engine.
Scales told by channel (`by_channel`) make fewer of them; what else was tried is in `rtx_tried.py`. Engines that miss the limit are compressed too, as
`build.options.tensorrt_rtx.compress` stores them, since sources are texts that are much alike. Writes benchmarks/results/rtx_size.json and .md, after each
network.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import _networks
import numpy as np
from onnx import ModelProto, NodeProto, checker, helper

from deployopt.artifact import INT8_PRECISIONS
from deployopt.backends import BuildRequest, tensorrt_rtx
from deployopt.bench.environment import environment
from deployopt.graph.editing import Graph, with_shapes
from deployopt.nn import ARCHITECTURES, CIFAR_ARCHITECTURES, macs
from deployopt.nn.pruning import Rules, prune
from deployopt.runtime import manifest
from deployopt.runtime.progress import SilentProgress

RESULTS = Path(__file__).resolve().parent / "results"
BATCH_SIZES = (1, 8)
LIMIT = 0.3
EXCEEDED = f" (above {LIMIT})"


class Built(NamedTuple):
    """An engine, and what it runs in which precision (`artifact.Verified`)."""

    plan: bytes
    verified: dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Engines of one architecture, in bytes, and what the INT8 one runs.

    Attributes:
        by_channel_bytes: the INT8 engine of `by_channel`'s graph.
        compressed: dense FP32 and pruned INT8 as they are stored compressed; None where the INT8 one is small enough as it is.
    """

    arch: str
    dense_fp32_bytes: int
    pruned_int8_bytes: int
    by_channel_bytes: int
    ratio: float
    macs_ratio: float
    quantized_layers: int
    quantizable_layers: int
    compressed: tuple[int, int] | None = None


def by_channel(model: ModelProto) -> ModelProto:
    """Canonical INT8 in which each feature map [N, C, H, W] is quantised with its one scale told C times: the same integers.

    TensorRT-RTX 1.7 then holds a kernel's source once for all convolutions of equal shape; a scalar makes it a kernel of its own. deployopt does not do it:
    TensorRT's documentation has scales of activations per tensor, and no GPU has run such an engine.
    """
    model = with_shapes(model)
    graph = Graph(model.graph)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*model.graph.input, *model.graph.value_info)}
    for quantizer in graph.nodes("QuantizeLinear"):
        shape = shapes.get(quantizer.input[0], [])
        if len(shape) == 4 and shape[1]:
            _spread(graph, quantizer, shape[1])
    graph.finish()
    checker.check_model(model, full_check=True)
    return model


def _spread(graph: Graph, quantizer: NodeProto, channels: int) -> None:
    """Scale and zero point of a QuantizeLinear as arrays [C] of one value, if they are stored scalars."""
    for position, name in enumerate(quantizer.input[1:], start=1):
        value = graph.constant(name)
        if value is not None and value.ndim == 0:
            quantizer.input[position] = graph.add_constant(f"{name}.by_channel", np.full(channels, value))
    kept = [a for a in quantizer.attribute if a.name != "axis"]
    del quantizer.attribute[:]
    quantizer.attribute.extend([*kept, helper.make_attribute("axis", 1)])


def build(model: ModelProto, precision: str, capability: float) -> Built:
    with TemporaryDirectory() as folder:
        canonical = Path(folder, "canonical.onnx")
        canonical.write_bytes(model.SerializeToString())
        prepared = tensorrt_rtx.prepare(canonical, precision, Path(folder, "model.onnx"))
        request = BuildRequest(precision, BATCH_SIZES, options={"compute_capabilities": [capability]})
        engine = tensorrt_rtx.build(prepared, Path(folder), request, SilentProgress())
        return Built(engine.path.read_bytes(), engine.metadata["verified"] if precision in INT8_PRECISIONS else {})


def sizes(arch: str, macs_ratio: float, capability: float) -> Sizes:
    made, images = _networks.network(arch, 32 if arch in CIFAR_ARCHITECTURES else 224)
    dense = build(_networks.exported(made), "fp32", capability).plan
    whole = macs.count(made, made.input_shape)[1]
    prune(made, int(macs_ratio * whole), Rules(round_to=8))
    quantized = _networks.int8(made, images)
    int8 = build(quantized, "int8", capability)
    ratio = len(int8.plan) / len(dense)
    return Sizes(
        arch,
        len(dense),
        len(int8.plan),
        len(build(by_channel(quantized), "int8", capability).plan),
        ratio,
        macs.count(made, made.input_shape)[1] / whole,
        int8.verified["quantized_layers"],
        int8.verified["quantizable_layers"],
        (len(manifest.compressed(dense)), len(manifest.compressed(int8.plan))) if ratio > LIMIT else None,
    )


def stored(row: Sizes) -> str:
    """What compressing makes of both, for the table."""
    if row.compressed is None:
        return "–"
    dense, int8 = row.compressed
    return f"{int8 / 1e6:.2f} of {dense / 1e6:.2f}: {int8 / dense:.3f}{EXCEEDED if int8 / dense > LIMIT else ''}"


def markdown(rows: list[Sizes], settings: dict[str, Any], date: str) -> str:
    lines = [
        f"TensorRT-RTX {settings['version']}, compute capability {settings['compute_capability']}, profile 1 to {max(BATCH_SIZES)} images, {date}.",
        "",
        "| network | dense FP32, MB | pruned INT8, MB | ratio | scales by channel, MB | both compressed, MB | MACs kept | layers in INT8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.arch} | {r.dense_fp32_bytes / 1e6:.2f} | {r.pruned_int8_bytes / 1e6:.2f} | {r.ratio:.3f}{EXCEEDED if r.ratio > LIMIT else ''} "
        f"| {r.by_channel_bytes / 1e6:.2f} | {stored(r)} | {100 * r.macs_ratio:.0f} % | {r.quantized_layers}/{r.quantizable_layers} |"
        for r in rows
    ]
    lines += [
        "",
        "An engine holds its kernels' sources beside the weights. In a CIFAR network's INT8 engine they are most of the file: `rtx_tried.md` tells why, and",
        "what was tried. Scales by channel, one value told for each, let convolutions of one shape share a source; deployopt does not write them, as no GPU",
        "has run such an engine. Compressed as `compress: true` stores them (xz), the sources all but vanish.",
    ]
    return "\n".join(lines) + "\n"


def kept(path: Path, settings: dict[str, Any]) -> dict[str, Sizes]:
    """Rows of an earlier run under the same settings, by architecture."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return {row["arch"]: Sizes(**row) for row in found["rows"]} if found.get("settings") == settings else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=ARCHITECTURES)
    parser.add_argument("--macs-ratio", type=float, default=0.4, help="MACs that pruning leaves")
    parser.add_argument("--compute-capability", type=float, default=8.6)
    arguments = parser.parse_args()
    settings = {
        "version": tensorrt_rtx.probe().version,
        "compute_capability": arguments.compute_capability,
        "batch_sizes": list(BATCH_SIZES),
        "macs_ratio": arguments.macs_ratio,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "rtx_size.json"
    rows = kept(path, settings)
    for arch in arguments.archs:
        rows[arch] = sizes(arch, arguments.macs_ratio, arguments.compute_capability)
        print(rows[arch], flush=True)
        ordered = [rows[a] for a in ARCHITECTURES if a in rows]
        found: dict[str, Any] = {"settings": settings, "environment": environment(tensorrt_rtx.distributions), "rows": [asdict(r) for r in ordered]}
        path.write_text(json.dumps(found, indent=2) + "\n")
        (RESULTS / "rtx_size.md").write_text(markdown(ordered, settings, found["environment"]["utc"]))


if __name__ == "__main__":
    main()
