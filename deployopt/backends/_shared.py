"""What all backends share: probing a vendor's module, build options checked, ONNX files read with their faults named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from deployopt.artifact import Availability
from deployopt.config import Strict
from deployopt.errors import BuildFailed, ExportFailed, LackingEnvironment, MissingDependency

if TYPE_CHECKING:
    from onnx import ModelProto


def probe(load_vendor: Callable[[], Any], describe: Callable[[Any], Availability]) -> Availability:
    """What `describe` says of the vendor's module; without that module, why it cannot be imported. Never raises."""
    try:
        vendor = load_vendor()
    except LackingEnvironment as exc:
        return Availability(False, False, None, None, exc.message, remedy=exc.remedy)
    return describe(vendor)


M = TypeVar("M", bound=Strict)


def bind(backend: str, model: type[M], options: Mapping[str, Any]) -> M:
    """Options of a recipe as the backend's model.

    Raises:
        BuildFailed: every wrong option at once, with those there are.
    """
    try:
        return model.model_validate(dict(options))
    except ValidationError as exc:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors())
        raise BuildFailed(
            f"options of {backend}: {faults} (available: {', '.join(model.model_fields) or 'none'})", "mend them in the recipe's build stage"
        ) from exc


def load(path: Path) -> ModelProto:
    """Parse an ONNX file.

    Raises:
        ExportFailed: the file holds no ONNX graph.
        MissingDependency: onnx is not installed.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError as exc:
        raise MissingDependency("onnx", "runtimes", "to prepare models for a runtime") from exc
    remedy = "deployopt run RECIPE --fresh --until export"
    try:
        model = onnx.load_from_string(path.read_bytes())
    except DecodeError as exc:
        raise ExportFailed(f"{path.name} is not an ONNX model", remedy) from exc
    if not model.graph.output:
        raise ExportFailed(f"{path.name} holds no graph", remedy)
    return model
