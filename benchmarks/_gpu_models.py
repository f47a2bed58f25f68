"""The ONNX files that `gpu.py` builds engines of: each precision derived from one INT8 file, which is small enough to carry. onnx and NumPy only."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from _gpu_rows import ARCHS, PRECISIONS, VARIANTS, path_of
from onnx import ModelProto, load, numpy_helper

from deployopt.errors import ArtifactCorrupt
from deployopt.graph.casts import cast
from deployopt.graph.editing import Graph, attribute, clone, with_shapes
from deployopt.graph.tensorrt import check_quantization, to_tensorrt8
from deployopt.runtime.files import atomic_write
from deployopt.runtime.hashing import sha256_file

DESCRIPTION = "models.json"
DIALECTS = ("canonical", "tensorrt8")


def without_quantization(model: ModelProto) -> ModelProto:
    """The FP32 network of an INT8 Q/DQ graph: activations as they are, weights as their integers stand for."""
    model = clone(model)
    graph = Graph(model.graph)
    for node in graph.nodes("DequantizeLinear"):
        values, scale = graph.constant(node.input[0]), graph.constant(node.input[1])
        quantizer = graph.producer(node.input[0], "QuantizeLinear")
        if quantizer is not None:
            source = quantizer.input[0]
        elif values is not None and scale is not None:
            source = node.input[0]
            axis = attribute(node, "axis", 1) % values.ndim
            shape = [-1 if i == axis else 1 for i in range(values.ndim)] if scale.size > 1 else []
            graph.initializers[source].CopyFrom(numpy_helper.from_array(values.astype(np.float32) * scale.reshape(shape), source))
        else:
            continue
        graph.redirect(node.output[0], source, list(graph.consumers[node.output[0]]))
    graph.finish()
    return with_shapes(model)


def in_precision(int8: ModelProto, precision: str) -> ModelProto:
    """The canonical model of a precision, from the INT8 one."""
    if precision == "int8":
        return int8
    if precision == "int8_fp16":
        return cast(int8, "fp16")
    fp32 = without_quantization(int8)
    return fp32 if precision == "fp32" else cast(fp32, "fp16")


def unpack(models: Path, dialect: str) -> list[Path]:
    """Write every network in every precision beside the files that were carried.

    Raises:
        ArtifactCorrupt: a carried file is not the one that was described.
    """
    described = json.loads((models / DESCRIPTION).read_text())
    made = []
    for arch, variant in ((a, v) for a in ARCHS for v in VARIANTS if f"{a}-{v}" in described["networks"]):
        carried = models / f"{arch}-{variant}.onnx"
        if sha256_file(carried) != described["networks"][f"{arch}-{variant}"]["sha256"]:
            raise ArtifactCorrupt(f"{carried.name} is not the file that {DESCRIPTION} describes", "carry both from one `gpu.py prepare`")
        int8 = load(str(carried))
        check_quantization(int8.graph)
        for precision in PRECISIONS:
            target = path_of(models / dialect, arch, variant, precision)
            target.parent.mkdir(exist_ok=True)
            model = in_precision(int8, precision)
            atomic_write(target, (to_tensorrt8(model) if dialect == "tensorrt8" else model).SerializeToString(deterministic=True))
            made.append(target)
    return made
