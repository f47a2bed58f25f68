import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_onnx

from deployopt.errors import ArtifactMismatch, MissingDependency, StageFailed, UsageError, WorkerDied
from deployopt.runtime.preprocessing import to_feed
from deployopt.runtime.session import SessionOptions
from deployopt.runtime.worker import Worker

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 2, 16, 16, 3), np.uint8)


@pytest.fixture
def model(tmp_path):
    return tiny_onnx.convolution(tmp_path / "tiny.onnx")


def worker(path, opener="OnnxRuntimeSession", timeout_s=60.0, **extra):
    return Worker(f"worker_openers:{opener}", path, SessionOptions(extra=extra), timeout_s)


def test_the_first_inference_is_the_one_before_everything_else(model):
    with worker(model, "SlowFirstSession") as w:
        w.start()
        assert w.load(IMAGES) >= 50
        assert w.load(IMAGES) < 50


@pytest.mark.parametrize("opener", ["OnnxRuntimeSession", "OpenVinoSession"])
def test_session_answers_from_its_child(model, opener):
    import onnxruntime

    with worker(model, opener) as w:
        opened = w.start()
        assert opened.inputs[0].name == "input"
        assert opened.inputs[0].shape[1:] == (3, 16, 16)
        assert opened.load_ms > 0
        assert w.load(IMAGES) > 0
        warm = w.warm_up(min_seconds=0.02)
        assert warm.runs >= 10
        block = w.block(50, first=warm.runs, lead_in=2)
        assert block.host_ns.shape == (50,)
        assert (block.host_ns > 0).all()
        outputs = w.infer(IMAGES[0])
        assert w.memory().peak_bytes > 10 << 20
        assert w.execution() == {}
    expected = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"]).run(None, {"input": to_feed(IMAGES[0])})[0]
    np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-4, atol=1e-5)


def test_how_it_was_executed_is_told(model):
    with Worker("worker_openers:GraphSession", model, SessionOptions(extra={"cuda_graph": True})) as w:
        w.start()
        with pytest.raises(UsageError, match="no inputs are bound"):
            w.execution()
        w.load(IMAGES)
        assert w.execution() == {"cuda_graph": "on"}


def test_options_reach_the_child(model):
    with Worker("worker_openers:with_arguments", model, SessionOptions(2, "cpu", "int8", {"a": [1]})) as w:
        assert w.start().provider == "('tiny.onnx', 2, 'cpu', 'int8', {'a': [1]})"


@pytest.mark.parametrize(("opener", "name"), [("segfault", "SIGSEGV"), ("killed", "SIGKILL")])
def test_crash_names_the_signal(model, opener, name):
    with worker(model, opener) as w:
        with pytest.raises(WorkerDied, match=rf"opening tiny.onnx .* was ended by {name}") as caught:
            w.start()
        assert not w.alive
    assert caught.value.remedy is not None
    assert opener != "segfault" or "loading the plug-in" in caught.value.message


def test_crash_while_timing(model):
    with worker(model, "CrashingSession", crash_at=5) as w:
        w.start()
        w.load(IMAGES)
        with pytest.raises(WorkerDied, match=r"timing tiny\.onnx"):
            w.block(10)


def test_hang_is_ended(model):
    with worker(model, "hang", timeout_s=1.0) as w:
        start = time.monotonic()
        with pytest.raises(WorkerDied, match="no answer within 1 s"):
            w.start()
        assert time.monotonic() - start < 10
        assert not w.alive


def test_our_errors_keep_type_and_remedy(model):
    with worker(model, "mismatch") as w, pytest.raises(ArtifactMismatch, match="another device") as caught:
        w.start()
    assert caught.value.remedy == "deployopt run RECIPE --fresh"
    with worker(model, "missing") as w, pytest.raises(MissingDependency) as missing:
        w.start()
    assert missing.value.extra == "runtimes"


def test_foreign_error_is_told_and_the_worker_lives(model):
    with worker(model, "foreign") as w:
        with pytest.raises(StageFailed, match=r"opening tiny.onnx in a child process: ValueError: a runtime's own error"):
            w.start()
        assert w.alive


def test_images_that_do_not_fit_are_refused(model):
    with worker(model) as w:
        w.start()
        with pytest.raises(ArtifactMismatch, match=r"takes \['batch', 3, 16, 16\], found images of \[2, 3, 8, 8\]"):
            w.load(IMAGES[:, :, :8, :8])
        assert w.load(IMAGES) > 0


def test_bytes_are_fed_as_bytes_and_other_integers_refused(tmp_path):
    opener = "deployopt.runtime.onnxruntime_session:open_session"
    with Worker(opener, tiny_onnx.sums_of_bytes(tmp_path / "bytes.onnx"), SessionOptions(1)) as w:
        w.start()
        assert w.infer(np.full((2, 4, 4, 3), 200, np.uint8))["logits"].tolist() == [[9600.0], [9600.0]]
    with Worker(opener, tiny_onnx.sums_of_bytes(tmp_path / "int32.onnx", "int32"), SessionOptions(1)) as w:
        w.start()
        with pytest.raises(ArtifactMismatch, match="takes int32; images are given as floats in 0–1, or as uint8"):
            w.infer(np.zeros((1, 4, 4, 3), np.uint8))


def test_requests_out_of_order_are_refused(model):
    with worker(model) as w:
        with pytest.raises(UsageError, match="not running"):
            w.infer(IMAGES[0])
        w.start()
        with pytest.raises(UsageError, match="no inputs are bound"):
            w.block(1)


def test_output_of_the_child_stays_out_of_ours(model, capfd):
    with worker(model, "noisy") as w:
        w.start()
    assert capfd.readouterr() == ("", "")


def test_idle_child_uses_no_cpu(model):
    with worker(model) as w:
        w.start()
        w.load(IMAGES)
        w.block(20)
        time.sleep(0.3)
        times = Path(f"/proc/{w._process.pid}/stat")
        before = times.read_text().split()[13:15]
        time.sleep(0.5)
        assert times.read_text().split()[13:15] == before


def test_child_ends_with_the_block(model):
    with worker(model) as w:
        w.start()
        pid = w._process.pid
    assert not os.path.exists(f"/proc/{pid}")


PARENT = """
import sys
from pathlib import Path
from deployopt.runtime.session import SessionOptions
from deployopt.runtime.worker import Worker
w = Worker("worker_openers:{opener}", Path({path!r}), SessionOptions())
{before}
print(w._process.pid, flush=True)
{after}
"""


def _parent(model, opener, before, after):
    program = PARENT.format(opener=opener, path=str(model), before=before, after=after)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def _gone(pid, within=5.0):
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # dead; nobody has collected it yet
            return True
        time.sleep(0.05)
    return False


def test_idle_child_dies_with_a_killed_parent(model):
    parent = _parent(model, "OnnxRuntimeSession", "w.start()", "import time; time.sleep(60)")
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    assert _gone(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_busy_child_dies_with_a_killed_parent(model):
    start = "import threading, time; threading.Thread(target=w.start, daemon=True).start(); time.sleep(2)"
    parent = _parent(model, "hang", start, "time.sleep(60)")
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    assert _gone(pid)


def test_interrupt_ends_the_child_without_a_word_from_it(model):
    parent = _parent(
        model,
        "OnnxRuntimeSession",
        "w.__enter__(); w.start()",
        "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt as e:\n    w.__exit__(type(e))",
    )
    pid = int(parent.stdout.readline())
    time.sleep(0.5)  # until it is inside its try
    parent.send_signal(signal.SIGINT)
    _, said = parent.communicate(timeout=20)
    assert said == ""
    assert _gone(pid)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_profile_comes_from_the_child(model, runtime):
    with Worker(f"deployopt.backends.{runtime}:open", model, SessionOptions()) as w:
        assert w.start().profiles
        layers = w.profile(IMAGES, runs=3)
    assert ("c0", "r0") in [layer.nodes for layer in layers]
    assert sum(layer.time_us for layer in layers) > 0


def test_a_session_without_a_profiler_says_so(model):
    with worker(model) as w:
        assert not w.start().profiles
        with pytest.raises(UsageError, match="CPUExecutionProvider do not time layers"):
            w.profile(IMAGES, runs=3)
