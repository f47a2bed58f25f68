"""Every exported model for every backend: prepare its dialect, build it, verify what the runtime makes of it.

A backend that fails costs its own rows, never the run.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast, get_args

from pydantic import Field, JsonValue, PositiveFloat, field_validator

from deployopt import backends, plugins
from deployopt.artifact import INT8_PRECISIONS, NOT_VERIFIED, Artifact, Availability, Precision, quantized_share
from deployopt.backends import BuildRequest
from deployopt.bench.environment import versions, without_folders
from deployopt.config import OptionsOf
from deployopt.data import Leading
from deployopt.errors import BuildFailed, DeployoptError, UsageError
from deployopt.runtime.process import interrupts_kept
from deployopt.runtime.progress import Progress
from deployopt.runtime.session import SessionOptions
from deployopt.stages import Expansion, Planning, Point, StageConfig, StageContext, StepOutput, StepResult
from deployopt.stages._parity import PARITY_IMAGES, WIDENED, compare, limit_of, onnx_outputs, outputs_by_batch

version = 14
not_after: frozenset[str] = frozenset()
after = frozenset({"export"})
cacheable = True
timed = True  # TensorRT chooses kernels by timing them
trains = False
from_scratch = False
distributions: tuple[str, ...] = ("onnx", "numpy")


class Config(StageConfig):
    """Options of `build`."""

    NOT_IN_KEY: ClassVar[frozenset[str]] = frozenset({"backends", "options", "on_unverified", "on_mismatch", "timeout_minutes"})  # see `_parameters`

    backends: tuple[str, ...] = Field(("onnxruntime", "openvino"), min_length=1, strict=False)
    """Runtimes to build for (`deployopt list backends`). One that this machine lacks stays in the report as unavailable."""
    options: Annotated[dict[str, dict[str, JsonValue]], OptionsOf("backends", among="backends")] = Field(default={})
    """Options of single backends, by backend."""
    batch_sizes: tuple[int, ...] = Field((1, 8), min_length=1, strict=False)
    """Batch sizes an engine's optimisation profile spans, from 1 to the largest, for which it is optimised. `benchmark` times no larger one."""
    timeout_minutes: PositiveFloat = 60.0
    """One build that takes longer is ended, and its row has failed. Large INT8 networks take TensorRT some minutes."""
    on_unverified: Literal["warn", "fail"] = "warn"
    """What to do with an artifact of which the runtime executes less in the precision asked for than all convolutions and matrix products (in INT8 but for
    those that mixed_precision keeps in float), or more in INT8 than that; and with an engine that does not tell."""
    on_mismatch: Literal["warn", "fail"] = "warn"
    """What to do with an engine whose outputs on validation images differ from ONNX Runtime's by more than rounding explains; engines that run here are
    compared after their build."""

    @field_validator("backends")
    @classmethod
    def _known_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        available = plugins.names("backends")
        unknown = [plugins.unknown("backend", name, available) for name in names if name not in available]
        if unknown:
            raise ValueError("; ".join(unknown))
        if len(set(names)) < len(names):
            raise ValueError(f"a backend is named twice: {', '.join(names)}")
        return names

    @field_validator("batch_sizes")
    @classmethod
    def _positive(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if min(sizes) < 1:
            raise ValueError(f"a batch size is at least 1, found {min(sizes)}")
        return tuple(sorted(set(sizes)))


def expand(config: Config, planning: Planning) -> list[Expansion]:
    """One step for each exported ONNX and backend; those the backend cannot build here, or would not run as asked, carry the reason."""
    models = [point for point in planning.points if point.kind == "onnx"]
    rows = [row for name in config.backends for row in backends.asked(name, config.options.get(name, {}))]
    probed = {name: backends.find(name).probe() if planning.here else None for name in rows}
    return [_step(point, name, config, found) for name, found in probed.items() for point in models]


def _build_options(config: Config, name: str) -> dict[str, Any]:
    """Of a row's backend; which providers there are is this stage's concern."""
    given = config.options.get(backends.runtime_of(name), {})
    return {key: value for key, value in given.items() if key != backends.PROVIDERS}


def _step(source: Point, name: str, config: Config, probed: Availability | None) -> Expansion:
    """`probed`: None while nothing may be asked of this machine."""
    if source.precision is None:
        raise UsageError(f"the exported model of '{source.variant}' states no precision; wanted one of {', '.join(get_args(Precision))}")
    return Expansion(
        inputs=(source,),
        makes=(Point("engine", source.variant, source.family, precision=source.precision, backend=name, max_batch=max(config.batch_sizes)),),
        label=f"{source.variant}-{name}-{source.precision}",
        parameters=_parameters(name, source.precision, config, probed),
        why_not=probed.obstacle(name, source.precision) if probed else None,
    )


def _parameters(name: str, precision: str, config: Config, probed: Availability | None) -> dict[str, Any]:
    """What this one artifact depends on: its own backend's options and versions, no other's."""
    parameters: dict[str, Any] = {"backend": name, "options": _build_options(config, name)}
    if probed is None:  # no key is made of them then, and a backend's module loads NumPy
        return parameters
    backend = backends.find(name)
    parameters["options"] = backends.settled(name, parameters["options"], precision)
    parameters |= {"runtime": probed.version, "distributions": versions(backend.distributions)}
    parameters["runs"] = probed.runs  # what does not run where it is built is not compared, and its record says why
    parameters["on_unverified"] = config.on_unverified  # the policy decides whether what was built is kept
    if not getattr(backend, "builds_onnx", False):  # what is no engine is not compared
        parameters["on_mismatch"] = config.on_mismatch
    if backend.build_depends_on_machine:
        parameters["device"] = probed.device
    return parameters


def run(context: StageContext, config: Config, expansion: Expansion, inputs: Sequence[StepOutput]) -> StepResult:
    """Build one artifact. Whatever goes wrong in the backend becomes the record's status and reason.

    The record: status ("ok"; "built" if it cannot run on this machine; "failed"), reason, and for artifacts max_batch (None: any), notes (what a
    reader should know of it), verified and fusion (of an engine; see `artifact.Row`), provider, options, build_seconds,
    timing_cache ("new", "extended", or "reused" if nothing was timed; None: has none), parity (an engine's outputs
    against ONNX Runtime's; None where it cannot run).
    """
    (source,), (target,) = expansion.inputs, expansion.makes
    name = expansion.parameters["backend"]
    onnx = inputs[0].artifacts[source.artifact]
    request = BuildRequest(
        str(target.precision), config.batch_sizes, context.threads, context.device, expansion.parameters["options"], 60 * config.timeout_minutes
    )
    try:
        with interrupts_kept():
            artifact = build_prepared(name, onnx.path, context.folder, request, context.progress)
            verified = _verified(artifact, len(onnx.metadata.get("float_layers", ())))
            shortfall = _shortfall(artifact, request.precision, verified)
            if shortfall and config.on_unverified == "fail":
                raise BuildFailed(shortfall, "set build.on_unverified: warn to keep it")
            why_not = _why_not_here(name, artifact)
            parity, mismatch = _parity(context, name, artifact, onnx.path, request) if artifact.kind == "engine" and why_not is None else (None, None)
            if mismatch and config.on_mismatch == "fail":
                raise BuildFailed(mismatch, "set build.on_mismatch: warn to keep it")
    except DeployoptError as exc:
        return _failed(expansion.label, str(exc), context, onnx.path.parent)
    except Exception as exc:  # a third party's backend: its fault is this row's reason
        context.progress.log(traceback.format_exc())
        return _failed(expansion.label, f"{type(exc).__name__}: {exc}", context, onnx.path.parent)
    notes = _notes(artifact, request.precision, shortfall, mismatch)
    for note in notes:
        context.progress.log(f"{expansion.label}: {note}")
    record = {
        "status": "ok" if why_not is None else "built",
        "reason": why_not and without_folders(why_not),
        "max_batch": max(config.batch_sizes) if artifact.kind == "engine" else None,
        "notes": notes,
        "parity": parity,
        "verified": verified,
        **{key: artifact.metadata.get(key) for key in ("fusion", "provider", "options", "build_seconds", "timing_cache")},
    }
    return StepResult(record, {target.artifact: artifact})


def build_prepared(name: str, canonical: Path, folder: Path, request: BuildRequest, progress: Progress) -> Artifact:
    """A canonical ONNX in a backend's dialect, built into `folder`. Raises ExportFailed, BuildFailed."""
    backend, options = backends.find(name), backends.settled(name, request.options, request.precision)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        settling = [options] if hasattr(backend, "settle") else []  # its `prepare` takes them too
        prepared = cast(Any, backend).prepare(canonical, request.precision, Path(scratch) / "model.onnx", *settling)
        return backend.build(prepared, folder, replace(request, options=options), progress)


def _why_not_here(name: str, artifact: Artifact) -> str | None:
    """Why an artifact does not run on this machine: its backend does not, or it was built for other devices; None if it does."""
    probed = backends.find(name).probe()
    if not probed.runs:
        return probed.reason or "its backend does not run on this machine and does not say why"
    misfit: str | None = artifact.metadata.get("misfit")
    return misfit


def _verified(artifact: Artifact, kept_in_float: int) -> dict[str, Any] | None:
    """What the runtime told of its layers, and how many of them are in float on purpose; None if it told nothing."""
    found = artifact.metadata.get("verified")
    return None if found is None else {**found, "kept_in_float": kept_in_float}


def _shortfall(artifact: Artifact, precision: str, verified: Mapping[str, Any] | None) -> str | None:
    """What is missing from an artifact whose convolutions and matrix products should all run as asked, in INT8 but for those kept in float.

    All of them: float exports are cast at their edges only (`graph/casts.py`). None if nothing is missing, or if the backend tells of no artifact here.
    """
    in_int8 = precision in INT8_PRECISIONS
    if verified is None:
        told = f"{NOT_VERIFIED if in_int8 else f'{precision.upper()} is not verified'}: {artifact.metadata.get('verified_reason')}"
        return told if artifact.metadata.get("verifiable") else None
    executed, wanted = verified["executed"], verified["quantizable_layers"]
    ran = verified["quantized_layers"] if in_int8 else executed.get(precision, 0)
    missing = quantized_share(verified) not in (None, 1.0) if in_int8 else bool(executed) and ran < wanted
    listed = ", ".join(f"{count} in {kind}" for kind, count in sorted(executed.items()))
    kept = f"; mixed_precision keeps {verified['kept_in_float']} in float" if verified["kept_in_float"] else ""
    if in_int8 and ran > wanted - verified["kept_in_float"]:
        return f"{ran} of {wanted} layers run in INT8 ({listed}), more than should{kept}"
    if not missing:
        return None
    return f"only {ran} of {wanted} layers run in {'INT8' if in_int8 else precision.upper()} ({listed}){kept}"


def _parity(context: StageContext, name: str, artifact: Artifact, canonical: Path, request: BuildRequest) -> tuple[dict[str, Any], str | None]:
    """An engine's outputs, on this machine, held to those of ONNX Runtime, which runs the exported ONNX as it is written: in batches of the largest size, and
    some in batches of the smallest one too.

    Returns:
        {"checked", "reference", "widened" (how that ran a type which ONNX Runtime lacks, None if it lacks none), "batches", "n", "agreement", "max_abs_diff"
        and their limits}, of the batch size that is wrong, or differs more; and the mismatch, None if rounding explains it.

    Raises:
        DeployoptError: the engine cannot be opened or run.
    """
    from deployopt.backends._shared import load
    from deployopt.bench.targets import opener
    from deployopt.graph import macs
    from deployopt.runtime.worker import Worker

    images = Leading(context.dataset().validation, PARITY_IMAGES)
    options = artifact.metadata.get("options") or {}
    session = SessionOptions(request.threads, request.device, request.precision, options)
    with context.progress.track(f"compare {name} with ONNX Runtime", None), Worker(opener(name), artifact.path, session, request.timeout_s) as worker:
        output = worker.start().outputs[0].name
        outputs = outputs_by_batch(lambda pixels: worker.infer(pixels)[output], images, request.batch_sizes)
    precision = cast(Precision, request.precision)
    reference = onnx_outputs(canonical, precision, images, request.threads)[: len(images)]
    rounding: Precision = "fp16" if options.get("tf32") and precision == "fp32" else precision  # TF32 has FP16's mantissa
    limit = limit_of(rounding, len(macs.by_node(load(canonical))))
    found = [(*compare(scored, reference, limit, context.task), size) for size, scored in outputs.items()]
    figures, fault, size = next((item for item in found if item[1]), max(found, key=lambda item: item[0].get("max_abs_diff", math.inf)))
    mismatch = f"its outputs on {len(images)} validation images, in batches of {size}, are not those of ONNX Runtime: {fault}" if fault else None
    return {"checked": True, "reference": "onnxruntime", "widened": WIDENED.get(precision), "batches": list(outputs), "n": len(images), **figures}, mismatch


def _notes(artifact: Artifact, precision: str, shortfall: str | None, mismatch: str | None) -> list[str]:
    """Outputs that are not as they should be, the shortfall or why INT8 cannot be verified, and what the backend noted."""
    facts = artifact.metadata
    unverified = facts.get("verified_reason") if precision in INT8_PRECISIONS and facts.get("verified") is None and not shortfall else None
    said = (mismatch, shortfall, unverified and f"{NOT_VERIFIED}: {unverified}", *facts.get("notes", ()))
    return [without_folders(str(note)) for note in said if note]


def _failed(label: str, reason: str, context: StageContext, source: Path) -> StepResult:
    """A failed step: the log has the reason as it is, the record without this machine's folders."""
    for left in context.folder.iterdir():  # half-built files would be cached as this step's
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    context.progress.log(f"{label} failed: {reason}")
    return StepResult({"status": "failed", "reason": without_folders(reason, context.folder, source)})
