"""What the backends `tensorrt` and `tensorrt_rtx` share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployopt.artifact import Artifact, Verified
from deployopt.backends import BuildRequest
from deployopt.backends._shared import load
from deployopt.config import Strict
from deployopt.errors import ArtifactMismatch, BackendUnavailable
from deployopt.runtime import manifest
from deployopt.runtime.child import run_in_child
from deployopt.runtime.cuda import device_index, find_gpu
from deployopt.runtime.files import atomic_write, built_onto
from deployopt.runtime.preprocessing import PREPROCESSING_KEY
from deployopt.runtime.progress import Progress
from deployopt.runtime.session import TensorSpec
from deployopt.runtime.tensorrt import BuildOptions
from deployopt.runtime.tensorrt_layers import Execution

if TYPE_CHECKING:
    from onnx import ModelProto

FUSION = ("adds", "fused_adds", "int8_to_float", "reformats", "layers")  # of `Execution`: what reports tell beside the verified layers
TF32 = "TF32 was allowed: what is FP32 in the graph may be computed with 10 bits of mantissa"


class BuildOptionsModel(Strict):
    """Base of a backend's `Options`: strict, unknown keys refused."""

    tf32: bool = False
    """Let FP32 be computed in TF32 (10 bits of mantissa) on GPUs from Ampere on. Its row says so."""
    compress: bool = False
    """Store the engine as model.engine.xz. Engines of TensorRT-RTX hold their kernels' sources, which are most of a small INT8 network's engine and shrink
    to a few percent; weights hardly shrink. Whoever opens the file decompresses it first; compressing takes about a second a megabyte."""


def prepare(canonical: Path, out: Path, *, weakly_typed: bool = False) -> Path:
    """The canonical ONNX as it is: its Q/DQ already stand where TensorRT 10 and TensorRT-RTX want them. What they would misread is refused.

    Args:
        weakly_typed: write the dialect of TensorRT 8.x.

    Raises:
        ExportFailed: no ONNX graph; or names the first node that quantises asymmetrically, to UINT8, or a bias; or what 8.x cannot read.
        BuildFailed: the disk is full.
    """
    from deployopt.graph.tensorrt import check_quantization, to_tensorrt8

    model = load(canonical)
    check_quantization(model.graph)
    data = to_tensorrt8(model).SerializeToString(deterministic=True) if weakly_typed else canonical.read_bytes()
    with built_onto(out, len(data)):
        atomic_write(out, data)
    return out


def build(prepared: Path, out: Path, request: BuildRequest, progress: Progress, *, vendor: str, options: BuildOptions, compress: bool) -> Artifact:
    """Build `out/<name>.engine`, or `….engine.xz`, and its manifest in a child process, so that a crash of native code fails this artifact alone.

    Raises:
        BuildFailed, BackendUnavailable.
    """
    engine, model = out / f"{prepared.stem}.engine{manifest.COMPRESSED if compress else ''}", load(prepared)
    try:
        facts = run_in_child(
            "deployopt.runtime.tensorrt:build_file",
            {
                "vendor": vendor,
                "onnx": str(prepared),
                "engine": str(engine),
                "precision": request.precision,
                "device": request.device,
                "options": options.to_json(),
                "preprocessing": _preprocessing(model),
                "nodes": [[node.name or node.output[0], node.op_type] for node in model.graph.node],
            },
            progress,
            f"building {engine.name} with {vendor}",
            request.timeout_s,
        )
    except KeyboardInterrupt:  # the child may have been just through
        engine.unlink(missing_ok=True)
        manifest.path_of(engine).unlink(missing_ok=True)
        raise
    verified, notes = _verified(facts)
    if options.tf32:
        notes = [TF32, *notes]
    told = {"build_seconds": facts["seconds"], "timing_cache": facts["timing_cache"], "options": facts["options"]}
    told |= {"misfit": _misfit(engine, request.device)}
    metadata = {"precision": request.precision, **told, "notes": notes, **verified}
    return Artifact.of("engine", engine, inputs=_specs(facts["inputs"]), outputs=_specs(facts["outputs"]), metadata=metadata)


def _misfit(engine: Path, device: str) -> str | None:
    """Why an engine is not for this machine's GPU but for others; None if it is, or if there is no GPU, which `probe` says."""
    try:
        manifest.check_gpu(engine, manifest.read(engine), find_gpu(device_index(device)))
    except ArtifactMismatch as exc:
        return exc.message
    except BackendUnavailable:
        return None
    return None


def _preprocessing(model: ModelProto) -> dict[str, Any] | None:
    """What the exporter wrote into the ONNX of its input images, if it did."""
    properties = {p.key: p.value for p in model.metadata_props}
    return json.loads(properties[PREPROCESSING_KEY]) if PREPROCESSING_KEY in properties else None


def _specs(rows: list[list[Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in rows)


def _verified(facts: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The artifact's facts on what the engine executes, and what a reader should know of it."""
    if facts["execution"] is None:
        return {"verified": None, "verified_reason": facts["reason"], "verifiable": True}, []
    ran = Execution(**facts["execution"])
    found = {
        "verified": asdict(Verified(ran.quantized_layers, ran.quantizable_layers, ran.executed)),
        "fusion": {name: getattr(ran, name) for name in FUSION},
    }
    return found, [note for note in (_unfused(ran),) if note]


def _unfused(ran: Execution) -> str | None:
    """What keeps an INT8 engine from gaining what INT8 could; None if nothing does."""
    if not ran.quantized_layers:
        return None
    if ran.int8_to_float:
        return (
            f"{ran.int8_to_float} of {ran.quantized_layers} INT8 layers write floating point that a kernel of its own quantises again, "
            "so a speed-up over FP16 is doubtful; the file is smaller"
        )
    loose = ran.adds - ran.fused_adds
    return f"{loose} of {ran.adds} residual Adds are not fused into a convolution: each is a kernel of its own" if loose else None
