import json

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
    LayerTime("r", "Reorder", (), "fp32", 10.0),
    LayerTime("b", "Conv", ("conv2",), "int8", 60.0),
]


def test_a_summary_puts_the_slowest_first_and_adds_up():
    found = profiles.summarize((50, LAYERS), shown=2)
    assert (found["runs"], found["total_us"], found["precision_us"]) == (50, 100.0, {"int8": 90.0, "fp32": 10.0})
    assert [layer["name"] for layer in found["layers"]] == ["b", "a"]
    assert found["layers"][1]["nodes"] == ["conv1", "relu1"]
    assert found["others"] == {"layers": 1, "time_us": 10.0}
    whole = profiles.summarize((50, LAYERS))
    assert len(whole["layers"]) == 3
    assert whole["others"] == {"layers": 0, "time_us": 0}


def test_a_file_has_all_layers_in_the_order_of_execution(tmp_path):
    path = profiles.write((50, LAYERS), Row("qat", "openvino", "int8", 1, "ok"), tmp_path)
    assert path.name == "qat-openvino-int8-b1.json"
    written = json.loads(path.read_text())
    assert (written["row"], written["unit"], written["runs"]) == ("qat/openvino/int8/b1", "us", 50)
    assert [layer["name"] for layer in written["layers"]] == ["a", "r", "b"]


@pytest.fixture
def taken(tmp_path):
    """Profiles of a runtime that can tell, of one that cannot, and of a model that takes other images."""
    settings = Settings(min_seconds=0.05)
    path = tiny_onnx.convolution(tmp_path / "tiny.onnx")
    other = tiny_onnx.convolution(tmp_path / "other.onnx", size=8)
    openers = {"told": "deployopt.backends.onnxruntime:open", "silent": "worker_openers:OnnxRuntimeSession", "other": "deployopt.backends.onnxruntime:open"}
    subjects = [Subject(key, opener, other if key == "other" else path) for key, opener in openers.items()]
    with Group(subjects, settings, SilentProgress()) as group:
        images = dict.fromkeys(openers, IMAGES)
        results = group.measure(images, 2, "noise")
        yield results, profiles.take(group, images, 2, results, SilentProgress())


def test_what_was_measured_is_profiled_where_the_runtime_tells(taken):
    results, found = taken
    assert isinstance(results["other"], Failure)
    assert list(found) == ["told"]
    runs, layers = found["told"]
    assert profiles.FEWEST_RUNS <= runs <= profiles.MOST_RUNS
    assert ("c0", "r0") in [layer.nodes for layer in layers]
