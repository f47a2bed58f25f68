"""Is this ONNX sound?"""

from __future__ import annotations

from onnx import ModelProto, checker, shape_inference

from deployopt.errors import ExportFailed
from deployopt.graph.editing import with_shapes


def check(model: ModelProto) -> None:
    """onnx's full checker, strict shape inference, and a dynamic batch axis on every input and output.

    Raises:
        ExportFailed: with onnx's text or the tensor whose first axis is fixed.
    """
    try:
        checker.check_model(model, full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError) as exc:
        raise ExportFailed(f"the ONNX checker refuses the graph: {exc}") from exc
    inferred = with_shapes(model)
    names = {t.name for t in inferred.graph.initializer}
    for value in (*inferred.graph.input, *inferred.graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.name not in names and not (dims and dims[0].dim_param):
            found = [d.dim_param or d.dim_value for d in dims]
            raise ExportFailed(f"'{value.name}' must have a dynamic batch axis first, found shape {found}", "export with a named dynamic first axis")
