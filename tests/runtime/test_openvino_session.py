import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from residual_onnx import images, quantized, residual, run

from deployopt.errors import ArtifactMismatch, BackendUnavailable, UsageError
from deployopt.graph.canonical import canonicalize
from deployopt.graph.dialects import to_openvino
from deployopt.runtime import host
from deployopt.runtime.openvino_session import compile_model, executed_layers, load_vendor, not_offered, open_session
from deployopt.runtime.sampler import time_streams
from deployopt.runtime.saturation import saturates_here
from deployopt.runtime.session import SessionOptions, TensorSpec


@pytest.fixture
def path(tmp_path):
    onnx.save(canonicalize(residual()), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_infer_gives_the_models_outputs_at_any_batch(path):
    with open_session(path, SessionOptions()) as session:
        assert list(session.inputs) == [TensorSpec("image", ("batch", 3, 16, 16), "float32")]
        assert list(session.outputs) == [TensorSpec("logits", ("batch", 10), "float32")]
        assert session.provider == "CPU"
        for n in (1, 2, 7, 64):
            np.testing.assert_allclose(session.infer({"image": images(n)})["logits"], run(residual(), images(n)), atol=1e-4)


def test_outputs_and_feeds_belong_to_the_caller(path):
    with open_session(path, SessionOptions()) as session:
        feeds = [{"image": images(2, seed)} for seed in (1, 2)]
        loaded = session.load(feeds)
        first = session.infer(feeds[0])["logits"]
        kept = first.copy()
        for index in range(len(loaded)):
            loaded.run(index)
        session.infer({"image": images(2, seed=3)})
        np.testing.assert_array_equal(first, kept)
        np.testing.assert_array_equal(feeds[1]["image"], images(2, seed=2))
        assert loaded.device_ms() is None


def test_a_loaded_run_computes_the_feed_asked_for(path):
    with open_session(path, SessionOptions()) as session:
        feeds = [{"image": images(2, seed)} for seed in (1, 2)]
        loaded = session.load(feeds)
        for index in (0, 1, 2):
            loaded.run(index)
            np.testing.assert_array_equal(loaded._request.get_output_tensor(0).data, session.infer(feeds[index % 2])["logits"])


def test_a_missing_input_is_refused_also_after_a_run(path):
    with open_session(path, SessionOptions()) as session:
        session.infer({"image": images(1)})
        with pytest.raises(UsageError, match="the model takes"):
            session.infer({})


def test_fp32_is_executed_in_fp32(path):
    compiled = compile_model(path, SessionOptions(precision="fp32", threads=2))
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 2
    assert compiled.get_property("NUM_STREAMS") == 1


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_precision_is_opened_only_where_it_is_executed(path, precision):
    reason = not_offered(load_vendor().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"), precision)
    if reason is None:
        with open_session(path, SessionOptions(precision=precision)) as session:
            assert np.isfinite(session.infer({"image": images(1)})["logits"]).all()
    else:
        with pytest.raises(BackendUnavailable, match="would compute in FP32"):
            open_session(path, SessionOptions(precision=precision))


@pytest.mark.parametrize("vnni", [False, True])
def test_int8_computes_what_the_file_says(tmp_path, vnni):
    """int16 saturation on CPUs without VNNI shows here, and so does Q/DQ that OpenVINO fuses away without rounding: then nearly every image differs."""
    model, scales = quantized()
    if vnni and saturates_here():
        pytest.skip("this CPU has no VNNI: such files are refused")
    dialect = to_openvino(canonicalize(model, scales=scales), vnni=vnni)
    onnx.save(dialect, tmp_path / "model.onnx")
    with open_session(tmp_path / "model.onnx", SessionOptions(precision="int8")) as session:
        found = session.infer({"image": images(1000)})["logits"]
    reference = run(dialect, images(1000))
    assert np.abs(found - reference).max() < 0.1 * reference.std()
    # a sum of floats in another order tips a rounding here and there
    differs = (np.abs(found - reference) > 0.01 * reference.std()).any(axis=1)
    assert differs.mean() <= 0.03
    assert (found.argmax(1) == reference.argmax(1)).mean() >= 0.99


def test_a_file_for_vnni_is_refused_where_its_sums_would_overflow(tmp_path, monkeypatch):
    model, scales = quantized()
    for name, vnni in (("portable", False), ("vnni", True)):
        onnx.save(to_openvino(canonicalize(model, scales=scales), vnni=vnni), tmp_path / f"{name}.onnx")
    monkeypatch.setattr(host, "cpu", lambda: {"architecture": "x86_64", "isa": ["avx2"]})
    open_session(tmp_path / "portable.onnx", SessionOptions(precision="int8"))
    with pytest.raises(ArtifactMismatch, match="for CPUs with VNNI; on this one sums of products would overflow"):
        open_session(tmp_path / "vnni.onnx", SessionOptions(precision="int8"))
    assert executed_layers(compile_model(tmp_path / "vnni.onnx", SessionOptions(precision="int8"), to_run=False))


def test_junk_is_a_mismatch_with_the_file_named(tmp_path):
    (tmp_path / "junk.onnx").write_bytes(b"no model")
    with pytest.raises(ArtifactMismatch, match=r"cannot run junk\.onnx"):
        open_session(tmp_path / "junk.onnx", SessionOptions())


def test_importing_openvino_sends_nothing():
    """OpenVINO's import alone reports to its maker unless its telemetry package is out of sight."""
    code = (
        "import sys; from deployopt.runtime.openvino_session import load_vendor; load_vendor().Core();"
        "print(sorted(m for m in sys.modules if m.split('.')[0] == 'openvino_telemetry'))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_streams_are_what_was_asked_for_and_run_at_once(path):
    compiled = compile_model(path, SessionOptions(threads=1, streams=2))
    assert (compiled.get_property("NUM_STREAMS"), compiled.get_property("INFERENCE_NUM_THREADS")) == (2, 2)
    with open_session(path, SessionOptions(threads=1, streams=2)) as session:
        assert session.streams == 2
        streams = [session.load([{"image": images(2, seed)}]) for seed in (1, 2)]
        assert len(time_streams(streams, 20).host_ns) == 20


@pytest.mark.parametrize("threads", [1, 2])
def test_how_threads_wait_is_told(path, threads):
    with open_session(path, SessionOptions(threads=threads)) as session:
        loaded = session.load([{"image": images(8)}])
        # one core alone has no threads that wait for each other
        assert loaded.execution() == ({"waiting_threads": "spin, then block"} if min(threads, len(host.cores())) > 1 else {})
        for _ in range(20):
            loaded.run(0)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.1  # had its threads gone on spinning, half a second each


def test_a_profile_leaves_the_first_runs_out(path):
    feeds = [{"image": images(1)}]
    compiled = compile_model(path, SessionOptions(), profiling=True)
    request = compiled.create_infer_request()
    for _ in range(10):
        request.infer([images(1)])
    averages_us = sum(entry.real_time.total_seconds() * 1e6 for entry in request.get_profiling_info())
    with open_session(path, SessionOptions()) as session:
        totals_us = [sum(layer.time_us for layer in session.profile(feeds, runs=20)) for _ in range(3)]
    assert 0 < min(totals_us) < averages_us


def test_a_session_of_several_streams_profiles_one_inference_at_a_time(path):
    with open_session(path, SessionOptions(threads=1, streams=2)) as session:
        layers = session.profile([{"image": images(2)}], runs=3)
        assert session.infer({"image": images(2)})["logits"].shape == (2, 10)
    assert sum(layer.time_us for layer in layers) > 0
    assert any("Convolution" in layer.kind for layer in layers)


def test_layers_are_counted_only_where_that_is_asked_for(path):
    counted = [compile_model(path, SessionOptions(), profiling=asked).get_property("PERF_COUNT") for asked in (False, True)]
    assert counted == ["NO", "YES"]
