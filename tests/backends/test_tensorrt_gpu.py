"""Engines of TensorRT and TensorRT-RTX on a GPU: built, held to ONNX Runtime's outputs, and every option of a build tried. Skipped without one."""

import numpy as np
import onnx
import pytest
from typed_onnx import SIZE, canonical

from deployopt.backends import BuildRequest, tensorrt, tensorrt_rtx
from deployopt.errors import BuildFailed, UsageError
from deployopt.graph.casts import cast
from deployopt.runtime import manifest
from deployopt.runtime.progress import SilentProgress
from deployopt.runtime.session import SessionOptions

pytestmark = pytest.mark.gpu
FEEDS = [{"input": np.random.default_rng(seed).random((3, 3, SIZE, SIZE), np.float32)} for seed in range(3)]
TF32 = {"rtol": 1e-2, "atol": 1e-2}  # 10 bits of mantissa


def usable(backend):
    found = backend.probe()
    if not found.runs:
        pytest.skip(f"{backend.__name__.rpartition('.')[2]} does not run here: {found.reason}")
    return backend


@pytest.fixture(params=[tensorrt, tensorrt_rtx], ids=["tensorrt", "tensorrt_rtx"])
def backend(request):
    return usable(request.param)


@pytest.fixture
def trt():
    return usable(tensorrt)


def build(backend, folder, precision="fp32", **options):
    """The network in its dialect, and its engine for batches of 1 to 4."""
    source = canonical(folder, "int8" if precision == "int8_fp16" else precision)
    if precision == "int8_fp16":
        onnx.save(cast(onnx.load(source), "fp16"), source)
    prepared = backend.prepare(source, precision, folder / "model.onnx")
    return prepared, backend.build(prepared, folder, BuildRequest(precision, (1, 4), device="cuda", options=options), SilentProgress())


def expected(prepared, feed):
    import onnxruntime

    return onnxruntime.InferenceSession(str(prepared), providers=["CPUExecutionProvider"]).run(None, feed)[0]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 2e-2), ("int8", 5e-2), ("int8_fp16", 7e-2)])
def test_engine_computes_what_onnxruntime_computes(backend, tmp_path, precision, tolerance):
    if refused := backend.probe().precisions[precision]:
        pytest.skip(refused)
    prepared, built = build(backend, tmp_path, precision)
    assert sum(built.metadata["verified"]["executed"].values()) == 4
    with backend.open(built.path, SessionOptions(device="cuda", precision=precision)) as session:
        for feed in FEEDS:
            np.testing.assert_allclose(session.infer(feed)["logits"], expected(prepared, feed), atol=tolerance)
        loaded = session.load(FEEDS)
        assert loaded.device_ms() is None
        loaded.run(0)
        assert loaded.device_ms() > 0
        assert loaded.execution().get("shape_specialization") == ("eager" if backend is tensorrt_rtx else None)
        with pytest.raises(UsageError, match="outside the engine's"):
            session.infer({"input": np.zeros((5, 3, SIZE, SIZE), np.float32)})


def test_a_profile_tells_the_engines_layers_by_their_onnx_nodes(backend, tmp_path):
    prepared, built = build(backend, tmp_path, "fp16")
    with backend.open(built.path, SessionOptions(device="cuda", precision="fp16")) as session:
        before = session.infer(FEEDS[0])["logits"]
        layers = session.profile(FEEDS, runs=4)
        np.testing.assert_array_equal(session.infer(FEEDS[0])["logits"], before)
    assert sum(layer.time_us for layer in layers) > 0
    assert all(layer.calls == 1 for layer in layers)
    assert {name for layer in layers for name in layer.nodes} <= {node.name for node in onnx.load(prepared).graph.node}


def test_the_manifest_describes_this_gpu(backend, tmp_path):
    _, built = build(backend, tmp_path)
    described = manifest.read(built.path)
    assert described.gpu.name in backend.probe().device
    assert described.compute_capabilities == (described.gpu.compute_capability,)


def test_an_engine_runs_as_a_cuda_graph_and_computes_the_same(trt, tmp_path):
    prepared, built = build(trt, tmp_path)
    with trt.open(built.path, SessionOptions(device="cuda", extra={"cuda_graph": True})) as session:
        loaded = session.load(FEEDS)
        for index in range(4):
            loaded.run(index)
        assert loaded.execution()["cuda_graph"] == "on"
        assert loaded.device_ms() > 0
        for feed in FEEDS:  # at the shape of the capture: the graph computes these too
            np.testing.assert_allclose(session.infer(feed)["logits"], expected(prepared, feed), atol=1e-4)
        one = {"input": FEEDS[0]["input"][:1]}  # at another one
        np.testing.assert_allclose(session.infer(one)["logits"], expected(prepared, one), atol=1e-4)
        loaded.run(0)
        assert loaded.execution()["cuda_graph"] == "on"


def test_a_second_build_times_nothing(trt, tmp_path):
    folders = [tmp_path / name for name in ("missed", "first", "second", "strict")]
    for folder in folders:
        folder.mkdir()
    with pytest.raises(BuildFailed) as caught:
        build(trt, folders[0], error_on_timing_cache_miss=True)
    assert "without error_on_timing_cache_miss" in caught.value.remedy
    used = [build(trt, folder)[1].metadata["timing_cache"] for folder in folders[1:3]]
    assert used == ["new", "reused"]
    assert build(trt, folders[3], error_on_timing_cache_miss=True)[1].metadata["timing_cache"] == "reused"


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({"workspace_mib": 64}, {"atol": 1e-4}), ({"optimization_level": 0}, {"atol": 1e-4}), ({"timing_cache": False}, {"atol": 1e-4}), ({"tf32": True}, TF32)],
    ids=lambda value: next(iter(value)),
)
def test_every_option_of_a_build_is_taken(trt, tmp_path, options, tolerance):
    prepared, built = build(trt, tmp_path, **options)
    assert (built.metadata["timing_cache"] is None) == (options.get("timing_cache") is False)
    recorded = manifest.read(built.path).options
    assert {name: recorded.get(name, False) for name in options} == options
    with trt.open(built.path, SessionOptions(device="cuda")) as session:
        np.testing.assert_allclose(session.infer(FEEDS[0])["logits"], expected(prepared, FEEDS[0]), **tolerance)
