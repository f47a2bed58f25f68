"""What the backends share whose artifact is an ONNX file: ONNX Runtime, on CPUs and GPUs, and OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from deployopt.artifact import Artifact, Verified
from deployopt.backends import BuildRequest
from deployopt.backends._shared import bind, load
from deployopt.config import Strict
from deployopt.runtime.child import run_in_child
from deployopt.runtime.clock import now_ns, seconds_since
from deployopt.runtime.files import atomic_write
from deployopt.runtime.progress import Progress
from deployopt.runtime.saturation import VNNI_KEY, has_vnni_here, saturates_here
from deployopt.runtime.session import TensorSpec

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto


_FOR_VNNI = "its INT8 is for CPUs with VNNI: for x86 CPUs without, set build.options.{runtime}.vnni: false"


class CpuOptions(Strict):
    """Build options of the runtimes that compute INT8 on x86 CPUs."""

    vnni: bool | None = None
    """Whether INT8 is for CPUs with VNNI (AVX-VNNI, AVX512-VNNI), whose sums of products cannot overflow, so that no kernel has to clip activations; null:
    if this machine's has it. On an x86 CPU without, such a file runs slowly in ONNX Runtime and is refused by OpenVINO."""


def settle(options: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """`CpuOptions` with `vnni` said, where INT8 depends on it."""
    settled = {key: value for key, value in options.items() if key != "vnni"}
    if precision == "int8":
        vnni = options.get("vnni")
        settled["vnni"] = has_vnni_here() if vnni is None else vnni
    return settled


def prepare(
    canonical: Path, precision: str, out: Path, dialect: Callable[..., ModelProto] | None = None, options: Mapping[str, Any] = MappingProxyType({})
) -> Path:
    """INT8 in the runtime's dialect, if it has one; float precisions as they are.

    Args:
        dialect: takes the graph and, by its name, `vnni`.
        options: `CpuOptions`, if there is a dialect.

    Raises:
        ExportFailed: a scale that only this dialect needs is missing; names the layer.
    """
    model = load(canonical)
    if precision == "int8" and dialect is not None:
        model = dialect(model, vnni=settle(options, precision)["vnni"])
    atomic_write(out, model.SerializeToString(deterministic=True))
    return out


def build(
    prepared: Path,
    out: Path,
    request: BuildRequest,
    progress: Progress,
    *,
    counter: str,
    runtime: str,
    provider: str,
    accepted: type[Strict] = Strict,
    arguments: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    unverified: str | None = None,
    lacks_vnni: str | None = None,
) -> Artifact:
    """Store the ONNX and have the runtime tell what it compiles it to.

    Args:
        counter, arguments: as of `verify`.
        runtime: the backend's name in a recipe.
        accepted: the model of the options that the request may hold.
        options: that sessions on it are opened with, in their `extra`.
        unverified: why what it returns says nothing of what is executed, if so.
        lacks_vnni: why what is for CPUs with VNNI does not run without, if so.

    Raises:
        BuildFailed: an option that there is not. BuildFailed, BackendUnavailable, ProviderFallback, ArtifactMismatch: the runtime does not take the model.
    """
    bind(runtime, accepted, request.options)
    start = now_ns()
    path = out / "model.onnx"
    model = load(prepared)
    atomic_write(path, prepared.read_bytes())
    with progress.track(f"compile for {provider}", None):
        verified = verify(path, request.precision, progress, request.timeout_s, counter=counter, arguments=arguments)
    for_vnni = any(p.key == VNNI_KEY for p in model.metadata_props)
    metadata = {
        "precision": request.precision,
        "provider": provider,
        "options": dict(options or {}),
        "build_seconds": seconds_since(start),
        "verified": None if unverified else asdict(verified),
        "verified_reason": unverified,
        "misfit": lacks_vnni if for_vnni and saturates_here() else None,
        "notes": [_FOR_VNNI.format(runtime=runtime)] if for_vnni else [],
    }
    return Artifact.of("onnx", path, inputs=specs(model.graph.input), outputs=specs(model.graph.output), metadata=metadata)


def verify(path: Path, precision: str, progress: Progress, timeout_s: float, *, counter: str, arguments: Mapping[str, Any] | None = None) -> Verified:
    """What the runtime executes of an ONNX file, counted in a child process, where a crash ends nothing else.

    Args:
        counter: "module:function" that takes `path`, `precision` and `arguments` and returns layers by executed precision.

    Raises:
        BuildFailed, BackendUnavailable, ProviderFallback, ArtifactMismatch: the runtime does not take the model.
    """
    given = {"path": str(path), "precision": precision, **(arguments or {})}
    executed = run_in_child(counter, given, progress, f"compiling {path.name} to see what runs", timeout_s)
    return Verified(executed.get("int8", 0), sum(executed.values()), executed)


def specs(values: Iterable[ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """Of a graph's inputs or outputs."""
    from onnx import helper

    def spec(value: ValueInfoProto) -> TensorSpec:
        tensor = value.type.tensor_type
        shape = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
        return TensorSpec(value.name, shape, helper.tensor_dtype_to_np_dtype(tensor.elem_type).name)

    return tuple(spec(value) for value in values)
