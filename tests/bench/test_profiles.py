import numpy as np
import pytest
import tiny_onnx

from deployopt.artifact import Row
from deployopt.bench import profiles
from deployopt.bench.harness import Failure, Group, Settings, Subject
from deployopt.runtime.progress import SilentProgress
from deployopt.runtime.session import LayerTime

IMAGES = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)
LAYERS = [
    LayerTime("a", "Conv", ("conv1", "relu1"), "int8", 30.0),
    LayerTime("r", "Reorder", (), "fp32", 10.001),
    LayerTime("b", "Conv", ("conv2",), "int8", 60.0),
]


def test_a_summary_keeps_the_order_of_execution_and_adds_up():
    found = profiles.summarize(LAYERS, 50)
    assert (found["runs"], found["total_us"], found["precision_us"]) == (50, 100.0, {"int8": 90.0, "fp32": 10.0})
    assert [layer["name"] for layer in found["layers"]] == ["a", "r", "b"]
    assert found["layers"][0] == {"name": "a", "kind": "Conv", "nodes": ["conv1", "relu1"], "precision": "int8", "time_us": 30.0, "calls": 1}


def test_a_row_gets_its_profile_or_a_note_why_it_has_none():
    row = Row("qat", "openvino", "int8", 1, "ok", notes=["a note"])
    summary = profiles.summarize(LAYERS, 50)
    assert profiles.with_profile(row, summary).profile == summary
    failed = profiles.with_profile(row, Failure("it was ended by SIGSEGV"))
    assert failed.profile is None
    assert failed.notes == ["a note", "its layers could not be timed: it was ended by SIGSEGV"]
    assert profiles.with_profile(row, None) == row


@pytest.fixture
def taken(tmp_path):
    """Profiles of a runtime that can tell, of one that cannot, of a model that takes other images, and of a profiler that crashes."""
    path, other = tiny_onnx.convolution(tmp_path / "tiny.onnx"), tiny_onnx.convolution(tmp_path / "other.onnx", size=8)
    onnxruntime = "deployopt.backends.onnxruntime:open"
    openers = {"told": onnxruntime, "silent": "worker_openers:OnnxRuntimeSession", "other": onnxruntime, "crashing": "worker_openers:CrashingProfile"}
    subjects = [Subject(key, opener, other if key == "other" else path) for key, opener in openers.items()]
    with Group(subjects, Settings(min_seconds=0.05), SilentProgress()) as group:
        images = dict.fromkeys(openers, IMAGES)
        results = group.measure(images, 2, "noise")
        yield results, profiles.take(group, images, 2, results, SilentProgress())


def test_what_was_measured_is_profiled_where_the_runtime_tells(taken):
    results, found = taken
    assert isinstance(results["other"], Failure)
    assert list(found) == ["told", "crashing"]
    told = found["told"]
    assert profiles.FEWEST_RUNS <= told["runs"] <= profiles.MOST_RUNS
    assert ["c0", "r0"] in [layer["nodes"] for layer in told["layers"]]
    assert told["total_us"] > 0
    assert isinstance(found["crashing"], Failure)
    assert "SIGSEGV" in found["crashing"].reason
    assert results["crashing"].host["p50"] > 0  # a profiler that crashes leaves what was measured as it is
