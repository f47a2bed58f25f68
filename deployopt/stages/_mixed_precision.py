"""Which layers a quantised variant keeps in float: sensitivity on validation, weighed by latency on the backend that will run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from deployopt.artifact import Precision
from deployopt.stages import StageContext
from deployopt.stages._quantize import MixedPrecision, Quantization, Sensitivity
from deployopt.stages._timing import SECONDS, Candidates

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from onnx import ModelProto

    from deployopt.nn.layer_sensitivity import Score, Study
    from deployopt.nn.models import Network

WHOLE = "INT8"
PRECISION: Precision = "int8"


def check(context: StageContext, config: Quantization) -> None:
    """Fail before training if `mixed_precision: auto` may have to time on a backend that cannot.

    Raises:
        BackendUnavailable: it does not run INT8 on this machine.
    """
    if config.automatic is not None:
        Candidates(context, config.automatic, PRECISION).require(f"{context.name}.mixed_precision.backend")


def decide(context: StageContext, config: Quantization, network: Network, reference: NDArray[np.float32] | None) -> dict[str, Any]:
    """Study a network that was just quantised, and take out of its quantisation the layers that `mixed_precision: auto` keeps in float.

    Args:
        reference: the float parent's outputs on the validation split; None if `config` asks for nothing that needs it.

    Returns:
        The record's "quantization": {"float_layers", "sensitivity" (None unless asked for or auto), "mixed_precision" (None unless auto)}.
    """
    from deployopt.nn.layer_sensitivity import Study
    from deployopt.nn.quantizer import float_layers, keep_float, quantization

    found: dict[str, Any] = {"sensitivity": None, "mixed_precision": None}
    if reference is not None:
        study = Study(network, reference, context.dataset().validation, context.task, context.device)
        found["sensitivity"] = _table(context, config, study)
    if config.automatic is not None and reference is not None:
        automatic = config.automatic
        found["mixed_precision"] = context.choices.get_or_make("mixed_precision", lambda: _choose(context, automatic, network, study, found["sensitivity"]))
        keep_float(network, found["mixed_precision"]["float_layers"])
    entry = quantization(network)
    assert entry is not None
    return {"float_layers": list(float_layers(entry)), **found}


def _table(context: StageContext, config: Quantization, study: Study) -> dict[str, Any]:
    """Every layer's sensitivity, which `mixed_precision: auto` needs and reports whether or not `sensitivity` asks for it: two passes a layer.

    Returns:
        {"images", "distance" ("kl" | "mse"), "int8" and "float" (the whole network in INT8, or in float with these weights), "layers"}, all scored on
        the same images.
    """
    asked = config.sensitivity if isinstance(config.sensitivity, Sensitivity) else Sensitivity()
    images = min(asked.images, len(context.dataset().validation))
    rows = study.sensitivity(images, context.progress)
    return {
        "images": images,
        "distance": "kl" if context.task.loss == "cross_entropy" else "mse",
        "int8": study.score((), images)._asdict(),
        "float": study.score(study.layers, images)._asdict(),
        "layers": [{"layer": row.layer, "alone": row.alone._asdict(), "spared": row.spared._asdict()} for row in rows],
    }


def _choose(context: StageContext, config: MixedPrecision, network: Network, study: Study, table: Mapping[str, Any]) -> dict[str, Any]:
    from deployopt.nn.layer_sensitivity import LayerScores, Score, keep_few
    from deployopt.report import summary, units

    task = {name: getattr(context.task, name) for name in ("primary", "unit", "higher_is_better")}
    parent = study.parent

    def accepted(score: Score) -> bool:
        drop = summary.accuracy_drop(score.primary, parent, task)
        return drop is not None and drop <= config.max_accuracy_drop_pp

    def describe(score: Score) -> str:
        change = units.change(summary.accuracy_change(score.primary, parent, task), task)
        return f"{change} of {units.metric_name(context.task.primary)} on validation (wanted a drop of at most {config.max_accuracy_drop_pp:g})"

    rows = [LayerScores(row["layer"], Score(**row["alone"]), Score(**row["spared"])) for row in table["layers"]]
    chosen = keep_few(
        study,
        rows,
        table["int8"]["distance"],
        accepted,
        lambda names: latency_cost(context, config, network, study, names),
        describe=describe,
        option=f"{context.name}.mixed_precision.max_accuracy_drop_pp",
    )
    return {"backend": config.backend, "batch": config.batch, "max_accuracy_drop_pp": config.max_accuracy_drop_pp, "parent": parent, **chosen}


def latency_cost(context: StageContext, config: MixedPrecision, network: Network, study: Study, names: Sequence[str]) -> dict[str, float]:
    """Share by which each layer, kept in float, lengthens the INT8 network's median latency: built by the backend, timed interleaved.

    Raises:
        BuildFailed, StageFailed: a candidate could not be built or timed.
    """
    from deployopt.bench.harness import speedup
    from deployopt.nn.export import canonical
    from deployopt.nn.quantizer import recorded_scales

    def export(kept: Sequence[str]) -> ModelProto:
        return canonical(study.graph(kept), network, recorded_scales(network, kept))

    with Candidates(context, config, PRECISION) as candidates:
        kept = {WHOLE: (), **{name: (name,) for name in names}}
        measured = candidates.measure({key: candidates.built(key, partial(export, layers)) for key, layers in kept.items()}, SECONDS)
    return {name: 1 / speedup(measured[WHOLE], measured[name])[0] - 1 for name in names}
