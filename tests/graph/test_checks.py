import pytest
from residual_onnx import residual

from deployopt.errors import ExportFailed
from deployopt.graph.canonical import canonicalize
from deployopt.graph.checks import check


def test_a_sound_model_passes():
    assert check(canonicalize(residual())) is None


def test_a_fixed_batch_is_refused_with_the_shape():
    model = residual()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    with pytest.raises(ExportFailed, match=r"'image' must have a dynamic batch axis first, found shape \[1, 3, 16, 16\]"):
        check(model)


def test_a_missing_tensor_is_refused():
    model = residual()
    del model.graph.initializer[0]
    with pytest.raises(ExportFailed, match="checker refuses the graph"):
        check(model)


def test_contradicting_shapes_are_refused():
    model = residual()
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 11
    with pytest.raises(ExportFailed):
        check(model)
