"""What all backends share: ONNX files read with their faults named, errors told as reasons."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deployopt.errors import DeployoptError, ExportFailed, MissingDependency

if TYPE_CHECKING:
    from onnx import ModelProto


def sentence(error: DeployoptError) -> str:
    """An error as a reason: on one line, with its remedy."""
    return error.message if error.remedy is None else f"{error.message}: {error.remedy}"


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
