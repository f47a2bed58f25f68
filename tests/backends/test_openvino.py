import onnx
import pytest
from residual_onnx import LAYERS, check_profile, quantized, residual

from deployopt.backends import BuildRequest, openvino
from deployopt.errors import ArtifactMismatch
from deployopt.graph.canonical import canonicalize
from deployopt.runtime.progress import SilentProgress
from deployopt.runtime.session import SessionOptions


def built(model, precision, folder):
    onnx.save(model, folder / "canonical.onnx")
    prepared = openvino.prepare(folder / "canonical.onnx", precision, folder / "prepared.onnx")
    out = folder / "out"
    out.mkdir()
    return openvino.build(prepared, out, BuildRequest(precision), SilentProgress())


def test_it_says_what_it_executes():
    probed = openvino.probe()
    assert probed.runs
    assert probed.builds
    assert probed.device
    assert probed.precisions["fp32"] is None
    assert probed.precisions["int8"] is None
    assert "that is precision int8" in probed.precisions["int8_fp16"]
    for precision in ("fp16", "bf16"):
        reason = probed.precisions[precision]
        assert reason is None or "would compute in FP32" in reason


def test_every_layer_of_the_dialect_runs_in_int8(tmp_path):
    model, scales = quantized()
    artifact = built(canonicalize(model, scales=scales), "int8", tmp_path)
    assert artifact.metadata["verified"] == {"quantized_layers": LAYERS, "quantizable_layers": LAYERS, "executed": {"int8": LAYERS}}
    assert artifact.inputs == (("image", ("batch", 3, 16, 16), "float32"),)
    with openvino.open(artifact.path, SessionOptions(precision="int8")) as session:
        assert session.provider == artifact.metadata["provider"] == "CPU"


def test_a_float_model_runs_in_fp32_throughout(tmp_path):
    assert built(canonicalize(residual()), "fp32", tmp_path).metadata["verified"]["executed"] == {"fp32": LAYERS}


def test_an_operator_that_is_not_known_fails_the_build(tmp_path):
    model = canonicalize(residual())
    model.graph.node[-1].op_type = "Frobnicate"
    with pytest.raises(ArtifactMismatch, match="Frobnicate"):
        built(model, "fp32", tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_profile_tells_layers_by_their_onnx_nodes_and_precision(tmp_path, precision):
    model, scales = quantized() if precision == "int8" else (residual(), None)
    artifact = built(canonicalize(model, scales=scales), precision, tmp_path)
    check_profile(openvino, artifact, precision)
