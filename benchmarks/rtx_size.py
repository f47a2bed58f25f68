"""Does a pruned INT8 TensorRT-RTX engine build for every ResNet, and how small is it beside the dense FP32 one? Needs no GPU.

    python benchmarks/rtx_size.py                            # about twenty minutes on two cores
    python benchmarks/rtx_size.py --archs resnet18 resnet20  # these anew; what else was measured under the same settings is kept

Weights are random: they change neither whether an engine builds nor its size. An engine holds weights and, for each kernel that is compiled on the GPU
later, its source with the library of functions that it uses: over 130 kB for each kernel that quantises, which is most of a small INT8 network's engine and
compresses well; so the compressed size is told too, and that of an engine of the graph as it was exported, without the dialect (`graph.tensorrt.to_rtx`).
What else was tried to make them smaller is in `rtx_tried.py`. Writes benchmarks/results/rtx_size.json and .md, after each network.
"""

from __future__ import annotations

import argparse
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import _networks
from onnx import ModelProto

from deployopt.artifact import INT8_PRECISIONS
from deployopt.backends import BuildRequest, tensorrt_rtx
from deployopt.bench.environment import environment
from deployopt.nn import ARCHITECTURES, CIFAR_ARCHITECTURES, macs
from deployopt.nn.pruning import Rules, prune
from deployopt.runtime.progress import SilentProgress

RESULTS = Path(__file__).resolve().parent / "results"
BATCH_SIZES = (1, 8)
LIMIT = 0.3
_TEXT = re.compile(rb"[\t\n\r\x20-\x7e]{1000,}")
_LIBRARY_ENDS = b"/*__MYELIN_NVRTC_KGEN_BUILTINS_END__*/"  # in the source of each kernel (TensorRT-RTX 1.7)


class Built(NamedTuple):
    """An engine's bytes, and what it runs in which precision (`artifact.Verified`)."""

    plan: bytes
    verified: dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Engines of one architecture, in bytes, as they are and compressed (zlib), and what the INT8 one runs.

    Attributes:
        exported_int8_bytes: of the INT8 graph as it was exported, without RTX's dialect.
        sources, sources_bytes: kernels' sources in the INT8 engine.
    """

    arch: str
    dense_fp32_bytes: int
    pruned_int8_bytes: int
    exported_int8_bytes: int
    ratio: float
    compressed_ratio: float
    sources: int
    sources_bytes: int
    macs_ratio: float
    quantized_layers: int
    quantizable_layers: int


def build(model: ModelProto, precision: str, capabilities: Sequence[float], batch_sizes: Sequence[int] = BATCH_SIZES, *, dialect: bool = True) -> Built:
    with TemporaryDirectory() as folder:
        prepared = Path(folder, "canonical.onnx")
        prepared.write_bytes(model.SerializeToString())
        if dialect:
            prepared = tensorrt_rtx.prepare(prepared, precision, Path(folder, "model.onnx"))
        request = BuildRequest(precision, tuple(batch_sizes), options={"compute_capabilities": list(capabilities)})
        engine = tensorrt_rtx.build(prepared, Path(folder), request, SilentProgress())
        return Built(engine.path.read_bytes(), engine.metadata["verified"] if precision in INT8_PRECISIONS else {})


def sources(plan: bytes) -> list[bytes]:
    """Sources of the kernels in an engine, a copy each."""
    return [text for text in _TEXT.findall(plan) if _LIBRARY_ENDS in text]


def sizes(arch: str, macs_ratio: float, capability: float) -> Sizes:
    made, images = _networks.network(arch, 32 if arch in CIFAR_ARCHITECTURES else 224)
    dense = build(_networks.exported(made), "fp32", [capability]).plan
    whole = macs.count(made, made.input_shape)[1]
    prune(made, int(macs_ratio * whole), Rules(round_to=8))
    quantized = _networks.int8(made, images)
    int8 = build(quantized, "int8", [capability])
    texts = sources(int8.plan)
    return Sizes(
        arch,
        len(dense),
        len(int8.plan),
        len(build(quantized, "int8", [capability], dialect=False).plan),
        len(int8.plan) / len(dense),
        len(zlib.compress(int8.plan)) / len(zlib.compress(dense)),
        len(texts),
        sum(map(len, texts)),
        macs.count(made, made.input_shape)[1] / whole,
        int8.verified["quantized_layers"],
        int8.verified["quantizable_layers"],
    )


def markdown(rows: list[Sizes], settings: dict[str, Any], date: str) -> str:
    lines = [
        f"TensorRT-RTX {settings['version']}, compute capability {settings['compute_capability']}, profile 1 to {max(BATCH_SIZES)} images, {date}.",
        "",
        "| network | dense FP32, MB | pruned INT8, MB | ratio | both compressed | as exported, MB | kernels' sources, MB | MACs kept | layers in INT8 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    missed = f" (above {LIMIT})"
    lines += [
        f"| {r.arch} | {r.dense_fp32_bytes / 1e6:.2f} | {r.pruned_int8_bytes / 1e6:.2f} | {r.ratio:.3f}{missed if r.ratio > LIMIT else ''} "
        f"| {r.compressed_ratio:.3f} | {r.exported_int8_bytes / 1e6:.2f} | {r.sources}: {r.sources_bytes / 1e6:.2f} | {100 * r.macs_ratio:.0f} % "
        f"| {r.quantized_layers}/{r.quantizable_layers} |"
        for r in rows
    ]
    lines += [
        "",
        "An engine holds its kernels' sources beside the weights. As exported: the INT8 engine without RTX's dialect, in which convolutions of one shape",
        "share the kernel that quantises their results. In a CIFAR network's INT8 engine the sources are still most of the file: `rtx_tried.md` tells why,",
        "and what else was tried.",
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
    stored = RESULTS / "rtx_size.json"
    rows = kept(stored, settings)
    for arch in arguments.archs:
        rows[arch] = sizes(arch, arguments.macs_ratio, arguments.compute_capability)
        print(rows[arch], flush=True)
        ordered = [rows[a] for a in ARCHITECTURES if a in rows]
        found: dict[str, Any] = {"settings": settings, "environment": environment(tensorrt_rtx.distributions), "rows": [asdict(r) for r in ordered]}
        stored.write_text(json.dumps(found, indent=2) + "\n")
        (RESULTS / "rtx_size.md").write_text(markdown(ordered, settings, found["environment"]["utc"]))


if __name__ == "__main__":
    main()
