"""What sections of a recipe that are each right by themselves ask of one another; all of it can be told without running anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from deployopt.artifact import INT8_PRECISIONS
from deployopt.config import ForLoss
from deployopt.nn import ARCHITECTURES
from deployopt.pipeline.expansion import Asked, Entry, Fault
from deployopt.recipe.tree import KeyPath
from deployopt.stages import Point
from deployopt.stages._quantize import Quantization
from deployopt.stages.benchmark import CAPTURES_GRAPHS


def model(section: Mapping[str, Any], entries: Sequence[Entry]) -> Iterator[Fault]:
    """A first stage that does not train works on what `model` describes: a network of random weights is worth neither compressing nor measuring.

    Third parties' networks may bring weights of their own.
    """
    for first in entries[1:2]:
        if section.get("arch") in ARCHITECTURES and section.get("weights") is None and not first.stage.from_scratch:
            message = f"would work on random weights: give model.weights, or begin with a stage that trains, such as finetune; '{first.stage_name}' does not"
            yield Fault(first.at, message, key=True)


class LossOption(NamedTuple):
    """An option, given and not off, that means something with one loss only."""

    at: KeyPath
    loss: str


def loss_options(entries: Sequence[Entry]) -> list[LossOption]:
    """Of all stages, at any depth."""
    return [option for entry in entries for option in _loss_options(entry.config, entry.at)]


def _loss_options(config: BaseModel, at: KeyPath) -> Iterator[LossOption]:
    for name, info in type(config).model_fields.items():
        value, path = getattr(config, name), (*at, info.alias or name)
        if isinstance(value, BaseModel):
            yield from _loss_options(value, path)
        elif name in config.model_fields_set and value:
            yield from (LossOption(path, marker.name) for marker in info.metadata if isinstance(marker, ForLoss))


def losses(options: Sequence[LossOption], loss: str) -> Iterator[Fault]:
    """Options of another loss than the task's."""
    for option in options:
        if option.loss != loss:
            yield Fault(option.at, f"is an option of {option.loss}, and the loss of this task is {loss}: remove it")


def budget(limits: Mapping[str, Any], entries: Sequence[Entry], steps: Sequence[Asked]) -> Iterator[Fault]:
    """Limits that nothing would be judged by, or that no row could ever meet.

    Args:
        steps: all that will run; empty if that could not be made out.
    """
    given = {name for name, value in limits.items() if value is not None}
    for entry in entries:
        if "max_accuracy_drop_pp" in given and getattr(entry.config, "accuracy", True) is False:
            yield Fault((*entry.at, "accuracy"), "false scores no artifact, so none can meet budget.max_accuracy_drop_pp: remove one of the two")
        yield from _mixed_precision(limits.get("max_accuracy_drop_pp"), entry)
    if not given or not steps:
        return
    if all(entry.stage.cacheable for entry in entries):  # what measures runs every time
        yield Fault(("budget",), "is never judged, since no stage measures: add the stage benchmark, or remove the budget", key=True)
        return
    points = [point for step in steps for point in step.points]
    built = [point for point in points if point.backend is not None]
    if "min_speedup" in given:
        yield from _comparable(points, built)
    if "min_quantized_layers" in given and not any(point.precision in INT8_PRECISIONS for point in built):
        message = "nothing is built in INT8: add a qat or ptq stage and int8 to export.precisions, or remove the limit"
        yield Fault(("budget", "min_quantized_layers"), message)


def _mixed_precision(allowed: object, entry: Entry) -> Iterator[Fault]:
    """Layers are kept in float for an accuracy of their own, which may be less than the budget allows."""
    automatic = entry.config.automatic if isinstance(entry.config, Quantization) else None
    if automatic is None or not isinstance(allowed, int | float) or automatic.max_accuracy_drop_pp <= allowed:
        return
    option = "max_accuracy_drop_pp"
    message = (
        f"accepts a drop of {automatic.max_accuracy_drop_pp:g}, and budget.{option} allows {allowed:g}: "
        f"set mixed_precision: {{{option}: {allowed:g}}}, or raise the budget"
    )
    yield Fault((*entry.at, "mixed_precision", *([option] if option in automatic.model_fields_set else [])), message)


def cuda_graphs(entries: Sequence[Entry], steps: Sequence[Asked]) -> Iterator[Fault]:
    """Graphs are captured of one backend's engines only.

    Args:
        steps: all that will run; empty if that could not be made out.
    """
    if not steps or any(point.backend == CAPTURES_GRAPHS for step in steps for point in step.points):
        return
    for entry in entries:
        if getattr(entry.config, "cuda_graph", False):
            message = f"true launches engines of {CAPTURES_GRAPHS} as CUDA graphs, and none is built: add it to build.backends, or remove cuda_graph"
            yield Fault((*entry.at, "cuda_graph"), message)


def _comparable(points: Sequence[Point], built: Sequence[Point]) -> Iterator[Fault]:
    dense = next((point.variant for point in points if point.kind == "torch" and point.fans_out and point.family == "float"), None)
    if not any((point.variant, point.precision) == (dense, "fp32") for point in built):
        lacking = "there is none: its network is quantised from the start" if dense is None else f"'{dense}' is not built in it: add fp32 to export.precisions"
        yield Fault(("budget", "min_speedup"), f"compares with the dense FP32 network, and {lacking}, or remove the limit")
