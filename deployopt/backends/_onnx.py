"""What the backends share whose artifact is an ONNX file: ONNX Runtime, on CPUs and GPUs, and OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployopt.artifact import Artifact, Verified
from deployopt.backends import BuildRequest
from deployopt.backends._shared import load
from deployopt.errors import BuildFailed
from deployopt.runtime.child import run_in_child
from deployopt.runtime.clock import now_ns, seconds_since
from deployopt.runtime.files import atomic_write
from deployopt.runtime.progress import Progress
from deployopt.runtime.session import TensorSpec

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto


def prepare(canonical: Path, precision: str, out: Path, dialect: Callable[[ModelProto], ModelProto] | None = None) -> Path:
    """INT8 in the runtime's dialect, if it has one; float precisions as they are.

    Raises:
        ExportFailed: a scale that only this dialect needs is missing; names the layer.
    """
    model = load(canonical)
    if precision == "int8" and dialect is not None:
        model = dialect(model)
    atomic_write(out, model.SerializeToString(deterministic=True))
    return out


def build(
    prepared: Path,
    out: Path,
    request: BuildRequest,
    progress: Progress,
    *,
    counter: str,
    provider: str,
    arguments: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    unverified: str | None = None,
) -> Artifact:
    """Store the ONNX and have the runtime tell what it compiles it to.

    Args:
        counter, arguments: as of `verify`.
        options: that sessions on it are opened with, in their `extra`.
        unverified: why what it returns says nothing of what is executed, if so.

    Raises:
        BuildFailed, BackendUnavailable, ProviderFallback, ArtifactMismatch: the runtime does not take the model.
    """
    if request.options:
        raise BuildFailed(f"{provider} builds take no options, found {', '.join(request.options)}", "remove them from the recipe's build.options")
    start = now_ns()
    path = out / "model.onnx"
    model = load(prepared)
    atomic_write(path, prepared.read_bytes())
    with progress.track(f"compile for {provider}", None):
        verified = verify(path, request.precision, progress, request.timeout_s, counter=counter, arguments=arguments)
    metadata = {
        "precision": request.precision,
        "provider": provider,
        "options": dict(options or {}),
        "build_seconds": seconds_since(start),
        "verified": None if unverified else asdict(verified),
        "verified_reason": unverified,
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
