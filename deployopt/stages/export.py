"""Each variant as canonical ONNX, one file a precision, compared with its torch parent on real images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from deployopt.artifact import FLOAT_PRECISIONS, INT8_PRECISIONS, Artifact, Precision
from deployopt.data import ImageSet, Leading
from deployopt.errors import ExportFailed, OptionRefused
from deployopt.graph import OPSET
from deployopt.runtime.files import atomic_write
from deployopt.runtime.preprocessing import PREPROCESSING_KEY
from deployopt.stages import Expansion, Planning, Point, StageConfig, StageContext, StepOutput, StepResult
from deployopt.stages._parity import BATCHES, PARITY_IMAGES, WIDENED, compare, limit_of, onnx_outputs
from deployopt.stages._training import load_parent

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from onnx import ModelProto

    from deployopt.nn.models import Network

version = 7
not_after = frozenset({"build", "benchmark"})
after: frozenset[str] = frozenset()
cacheable = True
timed = False
trains = False
from_scratch = False
traces = True
distributions = ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")

MIN_OPSET, MAX_OPSET = 19, 23  # 19: FP16 scales of Q/DQ; 23: the newest that torch.onnx writes for these operators
_TYPED: dict[Precision, Literal["fp16", "bf16"]] = {"fp16": "fp16", "bf16": "bf16", "int8_fp16": "fp16"}  # type of the float parts; else FP32
_REMEDY = (
    "if the network computes otherwise while it is traced (torch.compiler.is_compiling), let it compute alike; else this is a defect of the export: please "
    "report it with the recipe"
)


class Config(StageConfig):
    """Options of the export."""

    opset: int = Field(default=OPSET, ge=MIN_OPSET, le=MAX_OPSET)
    """ONNX operator set. BF16 files have at least 22, the first whose convolution takes it."""
    precisions: tuple[Precision, ...] = Field(default=("fp32", "fp16", "bf16", "int8"), min_length=1, strict=False)
    """Files to make: of float variants those of fp32, fp16 and bf16; of quantised variants int8 (FP32 around the INT8 layers) and int8_fp16 (FP16 there,
    for TensorRT, not yet tried on a GPU). Each is run by ONNX Runtime on validation images, in batches of 1, 2, 7 and 64, and held to the torch network, or
    the fake-quantised one; of bf16 the graph with the weights' rounding, but not that of activations, as ONNX Runtime has no BF16 convolution on CPUs."""

    @field_validator("precisions")
    @classmethod
    def _each_once(cls, value: tuple[Precision, ...]) -> tuple[Precision, ...]:
        if repeated := [p for p, n in Counter(value).items() if n > 1]:
            raise ValueError(f"{', '.join(repeated)} is given more than once")
        return value


def expand(config: Config, planning: Planning) -> list[Expansion]:
    steps = []
    for variant in planning.variants:
        allowed = INT8_PRECISIONS if variant.family == "int8" else FLOAT_PRECISIONS
        chosen = [p for p in config.precisions if p in allowed]
        points = tuple(Point("onnx", variant.variant, variant.family, artifact=p, precision=p) for p in chosen)
        if points:
            steps.append(Expansion((variant,), points, label=variant.variant, parameters={"precisions": chosen}))
    if not steps:
        families = ", ".join(f"{v.variant} ({v.family})" for v in planning.variants) or "none"
        raise OptionRefused(
            "precisions",
            f"{', '.join(config.precisions)} fits no variant (variants: {families}); "
            f"float variants take {', '.join(FLOAT_PRECISIONS)}, quantised ones {', '.join(INT8_PRECISIONS)}",
            "add a precision, or a qat or ptq stage before export",
        )
    return steps


def run(context: StageContext, config: Config, expansion: Expansion, inputs: Sequence[StepOutput]) -> StepResult:
    from deployopt.nn import evaluate
    from deployopt.nn.export import canonical, deployed
    from deployopt.nn.quantizer import float_layers, quantization, recorded_scales

    precisions: list[Precision] = list(expansion.parameters["precisions"])
    network, variant = load_parent(inputs, context.threads), expansion.inputs[0].variant
    entry = quantization(network)
    kept = float_layers(entry) if entry else ()
    images = Leading(context.dataset().validation, PARITY_IMAGES)
    records: dict[str, dict[str, Any]] = {}
    artifacts: dict[str, Artifact] = {}
    with context.progress.track(f"trace {variant}", None):
        module = deployed(network)
        # a float network itself, so that its capture and folding are checked too; a quantised one computes nothing but as its graph
        reference = evaluate.outputs(module if entry else network, images)
    with context.progress.track(f"write {variant} by torch.onnx", None):
        model = canonical(module, network, recorded_scales(network), opset=config.opset, metadata=_metadata(context, network, variant))
    with context.progress.track(f"cast and compare {variant}", len(precisions)) as bar:
        for precision in precisions:
            path = context.folder / f"{precision}.onnx"
            records[precision] = _write(model, precision, path)
            records[precision]["parity"] = _parity(path, precision, records[precision]["layers"], images, reference, context)
            artifacts[precision] = _artifact(path, precision, records[precision], inputs[0].artifacts["model"], kept)
            bar.advance(note=precision)
    return StepResult({"variant": variant, "precisions": records}, artifacts)


def _write(canonical: ModelProto, precision: Precision, path: Path) -> dict[str, Any]:
    from deployopt.graph import macs
    from deployopt.graph.casts import cast
    from deployopt.graph.checks import check
    from deployopt.graph.editing import opset_of

    typed = _TYPED.get(precision)
    model = cast(canonical, typed) if typed else canonical
    check(model)
    atomic_write(path, model.SerializeToString(deterministic=True))
    counted = macs.by_node(model)
    return {
        "opset": opset_of(model),
        "layers": len(counted),
        "macs": sum(counted.values()),
        "nodes": dict(sorted(Counter(n.op_type for n in model.graph.node).items())),
    }


def _artifact(path: Path, precision: Precision, record: dict[str, Any], parent: Artifact, float_layers: Sequence[str]) -> Artifact:
    facts = {"precision": precision, "opset": record["opset"], "float_layers": list(float_layers)}
    return Artifact.of("onnx", path, inputs=parent.inputs, outputs=parent.outputs, metadata=facts)


def _metadata(context: StageContext, network: Network, variant: str) -> dict[str, str]:
    return {
        "deployopt.variant": variant,
        PREPROCESSING_KEY: json.dumps(network.preprocessing.to_json(), sort_keys=True),
        "deployopt.classes": json.dumps(list(context.dataset().classes), ensure_ascii=False),
    }


def _parity(path: Path, precision: Precision, layers: int, images: ImageSet, reference: NDArray[np.float32], context: StageContext) -> dict[str, Any]:
    """Compare a file, run as written by ONNX Runtime without optimisations, with torch.

    Returns:
        {"checked", "widened" (how a type that ONNX Runtime lacks was run, None if it lacks none), "n", "batches", "agreement", "max_abs_diff", their limits}.

    Raises:
        ExportFailed: it differs by more than the precision's limit.
    """
    import numpy as np

    outputs = onnx_outputs(path, precision, images, context.threads)
    agreement, fault = compare(outputs, np.resize(reference, outputs.shape), limit_of(precision, layers), context.task)  # repeats as the images do
    if fault:
        raise ExportFailed(
            f"{path.name} disagrees with its torch parent on {len(images)} validation images: {fault}",
            "leave this precision out of export.precisions" if precision in _TYPED else _REMEDY,
        )
    return {"checked": True, "widened": WIDENED.get(precision), "n": len(images), "batches": list(BATCHES), **agreement}
