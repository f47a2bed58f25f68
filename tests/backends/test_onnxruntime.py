import onnx
import pytest
from residual_onnx import LAYERS, check_profile, images, quantized, residual

from deployopt.backends import BuildRequest, onnxruntime
from deployopt.errors import ArtifactMismatch, BuildFailed, ExportFailed
from deployopt.graph.canonical import canonicalize
from deployopt.runtime.onnxruntime_session import PRODUCTS
from deployopt.runtime.progress import SilentProgress
from deployopt.runtime.session import SessionOptions


def built(model, precision, folder, **options):
    onnx.save(model, folder / "canonical.onnx")
    prepared = onnxruntime.prepare(folder / "canonical.onnx", precision, folder / "prepared.onnx")
    out = folder / "out"
    out.mkdir()
    return onnxruntime.build(prepared, out, BuildRequest(precision, options=options), SilentProgress())


def test_it_says_what_it_executes():
    probed = onnxruntime.probe()
    assert probed.runs
    assert probed.builds
    assert probed.device
    assert {name for name, reason in probed.precisions.items() if reason is None} == {"fp32", "int8"}
    assert "FP32" in probed.precisions["fp16"]
    assert "that is precision int8" in probed.precisions["int8_fp16"]


def test_every_layer_of_the_dialect_runs_in_int8(tmp_path):
    model, scales = quantized()
    artifact = built(canonicalize(model, scales=scales), "int8", tmp_path)
    assert artifact.metadata["verified"] == {"quantized_layers": LAYERS, "quantizable_layers": LAYERS, "executed": {"int8": LAYERS}}
    assert artifact.path == tmp_path / "out" / "model.onnx"
    assert artifact.inputs == (("image", ("batch", 3, 16, 16), "float32"),)
    assert artifact.verified() == artifact
    with onnxruntime.open(artifact.path, SessionOptions(precision="int8")) as session:
        assert session.provider == artifact.metadata["provider"] == "CPUExecutionProvider"


def test_the_canonical_placement_would_not_fuse(tmp_path):
    onnx.save(canonicalize(quantized()[0]), tmp_path / "model.onnx")
    counted = onnxruntime.count_layers(str(tmp_path / "model.onnx"), "int8", SilentProgress())
    assert counted.get("int8", 0) < LAYERS
    assert sum(counted.values()) == LAYERS


def test_a_float_model_is_verified_too(tmp_path):
    artifact = built(canonicalize(residual()), "fp32", tmp_path)
    assert artifact.metadata["verified"]["executed"] == {"fp32": LAYERS}


def test_a_missing_scale_names_the_layer(tmp_path):
    with pytest.raises(ExportFailed, match=r"layer1\.0\.conv2"):
        built(canonicalize(quantized()[0]), "int8", tmp_path)


def test_junk_is_not_prepared(tmp_path):
    (tmp_path / "junk.onnx").write_bytes(b"no model")
    with pytest.raises(ExportFailed, match=r"junk\.onnx is not an ONNX model"):
        onnxruntime.prepare(tmp_path / "junk.onnx", "fp32", tmp_path / "out.onnx")


def test_an_operator_that_is_not_known_fails_the_build(tmp_path):
    model = canonicalize(residual())
    model.graph.node[-1].op_type = "Frobnicate"
    with pytest.raises(ArtifactMismatch, match="Frobnicate"):
        built(model, "fp32", tmp_path)


def test_options_are_refused(tmp_path):
    with pytest.raises(BuildFailed, match="optimise: Extra inputs are not permitted \\(available: vnni\\)"):
        built(canonicalize(residual()), "fp32", tmp_path, optimise=True)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_profile_tells_layers_by_their_onnx_nodes_and_precision(tmp_path, precision):
    model, scales = quantized() if precision == "int8" else (residual(), None)
    artifact = built(canonicalize(model, scales=scales), precision, tmp_path)
    products = check_profile(onnxruntime, artifact, precision)
    assert {layer.kind for layer in products} <= set(PRODUCTS)  # so the executed layers are in the order of the optimised graph


def test_a_profile_says_what_does_not_run_in_int8(tmp_path):
    onnx.save(canonicalize(quantized()[0]), tmp_path / "model.onnx")  # nothing fuses without the dialect's scales
    with onnxruntime.open(tmp_path / "model.onnx", SessionOptions(precision="int8")) as session:
        layers = session.profile([{"image": images(1)}], runs=2)
    assert {layer.precision for layer in layers if layer.kind in {"Conv", "FusedConv"}} == {"fp32"}
