"""Does a pruned INT8 TensorRT-RTX engine build for every ResNet, and how small is it beside the dense FP32 one? Needs no GPU.

    python benchmarks/rtx_size.py                            # about twenty minutes on two cores
    python benchmarks/rtx_size.py --archs resnet18 resnet20

Weights are random: they change neither whether an engine builds nor its size. An engine holds weights and, for each kernel that is compiled on the GPU
later, its source with the library of functions that it uses: some 130 kB for each of an INT8 network's quantise kernels, which is most of a small
network's engine and compresses well; so the compressed size is told too. Writes benchmarks/results/rtx_size.json and .md.
"""

from __future__ import annotations

import argparse
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import _networks
from onnx import ModelProto

from deployopt.artifact import Artifact
from deployopt.backends import BuildRequest, tensorrt_rtx
from deployopt.bench.environment import environment
from deployopt.nn import ARCHITECTURES, CIFAR_ARCHITECTURES, macs
from deployopt.nn.pruning import Rules, prune
from deployopt.runtime.progress import SilentProgress

RESULTS = Path(__file__).resolve().parent / "results"
BATCH_SIZES = (1, 8)
LIMIT = 0.3


@dataclass(frozen=True)
class Sizes:
    """Engines of one architecture, in bytes, as they are and compressed (zlib), and what the INT8 one runs."""

    arch: str
    dense_fp32_bytes: int
    pruned_int8_bytes: int
    ratio: float
    compressed_ratio: float
    macs_ratio: float
    quantized_layers: int
    quantizable_layers: int


def build(model: ModelProto, precision: str, capability: float) -> tuple[Artifact, int]:
    """The engine's facts and its compressed size in bytes; its file is gone when this returns."""
    with TemporaryDirectory() as folder:
        canonical = Path(folder, "canonical.onnx")
        canonical.write_bytes(model.SerializeToString())
        prepared = tensorrt_rtx.prepare(canonical, precision, Path(folder, "model.onnx"))
        request = BuildRequest(precision, BATCH_SIZES, options={"compute_capabilities": [capability]})
        engine = tensorrt_rtx.build(prepared, Path(folder), request, SilentProgress())
        return engine, len(zlib.compress(engine.path.read_bytes()))


def sizes(arch: str, macs_ratio: float, capability: float) -> Sizes:
    made, images = _networks.network(arch, 32 if arch in CIFAR_ARCHITECTURES else 224)
    dense, dense_compressed = build(_networks.exported(made), "fp32", capability)
    whole = macs.count(made, made.input_shape)[1]
    prune(made, int(macs_ratio * whole), Rules(round_to=8))
    int8, compressed = build(_networks.int8(made, images), "int8", capability)
    verified = int8.metadata["verified"]
    return Sizes(
        arch,
        dense.size_bytes,
        int8.size_bytes,
        int8.size_bytes / dense.size_bytes,
        compressed / dense_compressed,
        macs.count(made, made.input_shape)[1] / whole,
        verified["quantized_layers"],
        verified["quantizable_layers"],
    )


def markdown(rows: list[Sizes], settings: dict[str, Any], date: str) -> str:
    lines = [
        f"TensorRT-RTX {settings['version']}, compute capability {settings['compute_capability']}, profile 1 to {max(BATCH_SIZES)} images, {date}.",
        "",
        "| network | dense FP32, MB | pruned INT8, MB | ratio | both compressed | MACs kept | layers in INT8 |",
        "|---|---|---|---|---|---|---|",
    ]
    missed = f" (above {LIMIT})"
    lines += [
        f"| {r.arch} | {r.dense_fp32_bytes / 1e6:.2f} | {r.pruned_int8_bytes / 1e6:.2f} | {r.ratio:.3f}{missed if r.ratio > LIMIT else ''} "
        f"| {r.compressed_ratio:.3f} | {100 * r.macs_ratio:.0f} % | {r.quantized_layers}/{r.quantizable_layers} |"
        for r in rows
    ]
    lines += [
        "",
        "An engine holds its kernels' sources beside the weights. In a CIFAR network's INT8 engine those of the quantise kernels, one a convolution, are most",
        "of the file: small networks become smaller as ONNX files, and as engines only compressed.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=ARCHITECTURES)
    parser.add_argument("--macs-ratio", type=float, default=0.4, help="MACs that pruning leaves")
    parser.add_argument("--compute-capability", type=float, default=8.6)
    arguments = parser.parse_args()
    rows = []
    for arch in arguments.archs:
        rows.append(sizes(arch, arguments.macs_ratio, arguments.compute_capability))
        print(rows[-1], flush=True)
    settings = {"version": tensorrt_rtx.probe().version, "compute_capability": arguments.compute_capability, "batch_sizes": BATCH_SIZES}
    found: dict[str, Any] = {"settings": settings, "environment": environment(tensorrt_rtx.distributions), "rows": [asdict(r) for r in rows]}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "rtx_size.json").write_text(json.dumps(found, indent=2) + "\n")
    (RESULTS / "rtx_size.md").write_text(markdown(rows, settings, found["environment"]["utc"]))


if __name__ == "__main__":
    main()
