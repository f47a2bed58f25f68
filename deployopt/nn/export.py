"""A network as ONNX, by torch.onnx's dynamo exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from onnx import ModelProto
from torch import nn
from torch.fx import GraphModule

from deployopt.errors import ExportFailed
from deployopt.graph import OPSET
from deployopt.graph.canonical import Scales, canonicalize
from deployopt.nn.capture import MAX_BATCH, example_input, source_of
from deployopt.nn.quantizer import fake_quantized, folded, quantization

if TYPE_CHECKING:
    from deployopt.nn.models import Network

INPUT, OUTPUT, BATCH = "input", "output", "batch"


def deployed(network: Network) -> nn.Module:
    """The graph that is exported: BatchNorm folded, Q/DQ where it was quantised.

    On the CPU, float32 [N, C, H, W] in 0–1 → float32 [N, K].

    Raises:
        ExportFailed: torch.export cannot trace the network.
    """
    if quantization(network) is not None:
        return fake_quantized(network)
    return folded(network)


def canonical(module: nn.Module, network: Network, scales: Scales | None, *, opset: int = OPSET, metadata: Mapping[str, str] | None = None) -> ModelProto:
    """Canonical ONNX of a `deployed` graph of `network`: what `export` writes as FP32 or INT8, and candidates that are timed are built from.

    Args:
        scales: as `nn.quantizer.recorded_scales` says; None for a float network.

    Raises:
        ExportFailed: an operator has no ONNX form; names it and the line of source.
    """
    return canonicalize(to_onnx(module, example_input(network.preprocessing), opset), scales=scales, metadata=metadata)


def to_onnx(graph_module: nn.Module, example: torch.Tensor, opset: int) -> ModelProto:
    """ONNX of a `deployed` graph: input "input", output "output", axis "batch" dynamic, initializers named by module path.

    Args:
        example: float32 [2, C, H, W].

    Raises:
        ExportFailed: an operator has no ONNX form; names it and the line of source.
    """
    batch = torch.export.Dim(BATCH, min=1, max=MAX_BATCH)
    with _quiet():
        try:
            program = torch.onnx.export(
                graph_module,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: batch},),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as exc:
            reason = next((line for line in reversed(str(exc.__cause__ or exc).splitlines()) if line.strip()), type(exc).__name__)
            where = f" ({found})" if (found := _source(graph_module, reason)) else ""
            raise ExportFailed(
                f"the network could not be written as ONNX opset {opset}: {reason.strip()}{where}", "replace that operator in the network"
            ) from exc
    if program is None:
        raise ExportFailed(f"torch.onnx.export wrote nothing for opset {opset}")
    return program.model_proto


def _source(graph_module: nn.Module, reason: str) -> str | None:
    """The line of the model's code behind the operator that the exporter's reason names: "target=torch.ops.prims.bessel_j0.default".

    It is named as decomposed; the captured graph has the operator it came from, "aten.special_bessel_j0.default".
    """
    operator = re.search(r"target=torch\.ops\.\w+\.(\w+)", reason)
    if operator is None or not isinstance(graph_module, GraphModule):
        return None
    named = (n for n in graph_module.graph.nodes if n.op == "call_function" and str(n.target).rpartition(".")[0].endswith(operator[1]))
    return next((found for node in named if (found := source_of(node))), None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's step-by-step prints and its notes on its own packages; other warnings pass."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|onnxscript|onnx_ir)\.")
            yield
    finally:
        logger.setLevel(level)
