"""`bench`, `eval`, `predict`, `report` and `compare` on a real small model, each in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import stored_runs
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

DIGITS = [str(i) for i in range(10)]
PREPROCESSING = {"image_size": 8, "channels": 3, "resize": None, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}


def deployopt(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deployopt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "NO_COLOR": "1", "COLUMNS": "100"})


def linear(path: Path, classes: list[str] = DIGITS) -> Path:
    """A linear classifier of 8×8 images that records its preprocessing and classes as the export stage does."""
    weight = np.random.default_rng(0).normal(0, 0.1, (3 * 8 * 8, len(classes))).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["input"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["output"])],
        "linear",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", len(classes)])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"deployopt.preprocessing": json.dumps(PREPROCESSING), "deployopt.classes": json.dumps(classes)})
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linear(tmp_path_factory.mktemp("model") / "linear.onnx")


@pytest.fixture(scope="module")
def rows(model: Path) -> list[dict[str, Any]]:
    done = deployopt("bench", model, model, "--seconds", "0.1", "--json", "--quiet", "--threads", "1")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.fixture
def run_folder(tmp_path: Path, model: Path, rows: list[dict[str, Any]]) -> Path:
    """A run of what was really benched; on a busy machine its rows would be invalid."""
    variants = [{"name": r["variant"], "stage": "finetune", "family": "float", "parent": None} for r in rows]
    placed = [{**r, "status": "ok", "reason": None, "artifact": {**r["artifact"], "path": "model.onnx"}} for r in rows]
    document = {"schema": 1, "run": tmp_path.name, "variants": variants, "rows": placed, "recommended": {"row": 0, "why": "fastest"}}
    (tmp_path / "report.json").write_text(json.dumps({**document, "budget": {"met": True, "limits": {}, "violations": []}}))
    (tmp_path / "model.onnx").write_bytes(model.read_bytes())
    return tmp_path


def test_bench_speaks_json_and_prose(model: Path, rows: list[dict[str, Any]]) -> None:
    assert [r["variant"] for r in rows] == ["linear#1", "linear#2"]
    assert all(r["latency_ms"]["host"]["p50"] > 0 for r in rows)
    done = deployopt("bench", model, model, "--seconds", "0.1", "--batch", "1,2,1", "--quiet", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("linear#2  ") == 2  # a line a batch size, each of which is measured once
    assert "batch 1" in done.stdout
    assert "batch 2" in done.stdout
    assert "linear#2" in done.stdout
    assert "host clock, copies included · 1 thread" in done.stdout
    assert " cores" in done.stdout or " core " in done.stdout
    assert re.search(r"onnxruntime(-gpu)? 1\.", done.stdout)
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_bench_times_with_images_of_a_data_set(model: Path) -> None:
    done = deployopt("bench", model, "--data", "digits:image_size=8", "--batch", "2", "--seconds", "0.1", "--json", "--quiet", "--threads", "1")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["contract"]["inputs"] == {"buffers": 8, "shape": [2, 8, 8, 3], "types": ["float32"], "images": 256, "source": "images that were given"}


def test_eval_scores_and_refuses(model: Path) -> None:
    done = deployopt("eval", model, "--data", "digits:image_size=8,mean=[0.1,0.2,0.3]", "--json")
    assert done.returncode == 0, done.stderr
    score = json.loads(done.stdout)
    assert score["primary"] == "top1"
    assert 0 <= score["top1"] <= 1
    assert score["n"] == 539
    wrong = deployopt("eval", model, "--data", "digits:imge_size=8,test_fraction=2")
    assert wrong.returncode == 2
    assert "did you mean 'image_size'" in wrong.stderr
    assert "test_fraction: wants less than 1" in wrong.stderr
    other = deployopt("eval", model, "--data", "digits")
    assert other.returncode == 2
    assert "image_size 8 (the data: 32)" in other.stderr


def test_predict_names_classes_and_bad_images(run_folder: Path, tmp_path: Path) -> None:
    image = tmp_path / "digit.png"
    Image.fromarray(np.full((20, 20), 128, np.uint8)).save(image)
    done = deployopt("predict", run_folder, image, "--top", "2", "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert len(found["classes"]) == 2
    assert found["classes"][0]["name"] in DIGITS
    assert deployopt("predict", run_folder, image).stdout.startswith(f"{image}: {found['classes'][0]['name']} ")
    asked = ("--device", "cpu", "--threads", "1", "--quiet", "--top", "2", "--json")
    assert json.loads(deployopt("predict", run_folder, image, *asked).stdout)[0]["classes"][0]["name"] == found["classes"][0]["name"]
    missing = deployopt("predict", run_folder, tmp_path / "absent.png")
    assert missing.returncode == 2
    assert "absent.png" in missing.stderr


@pytest.mark.parametrize("command", ["bench", "eval", "predict"])
def test_a_device_that_is_not_there_is_lacking(model: Path, command: str) -> None:
    more = {"bench": (), "eval": ("--data", "digits:image_size=8"), "predict": (model,)}[command]
    done = deployopt(command, model, *more, "--device", "cuda:99")
    assert done.returncode == 3, done.stderr
    assert "wanted cuda:99" in done.stderr
    assert deployopt(command, model, *more, "--device", "tpu").returncode == 2


def test_a_file_that_cannot_be_written_is_named_with_its_option(run_folder: Path, tmp_path: Path) -> None:
    nowhere, compare = tmp_path / "nowhere" / "x.md", ("compare", run_folder, run_folder)
    for arguments, option in (
        (("report", run_folder, "--format", "markdown", "-o", nowhere), "--output"),
        *(((*compare, option, nowhere), option) for option in ("--markdown", "--junit", "--history")),
    ):
        done = deployopt(*arguments)
        assert done.returncode == 3, done.stderr
        remedy = f"name a file in a folder that exists and can be written: {option} FILE"
        assert done.stderr == f"error: {nowhere} cannot be written: No such file or directory\n  → {remedy}\n"
    folder = deployopt("report", run_folder, "--format", "json", "-o", run_folder)
    assert folder.returncode == 3, folder.stderr
    assert f"error: {run_folder} cannot be written: Is a directory" in folder.stderr


def test_report_and_compare_read_a_run(run_folder: Path) -> None:
    shown = deployopt("report", run_folder)
    assert shown.returncode == 0, shown.stderr
    assert "linear#1" in shown.stdout
    assert "\x1b" not in shown.stdout
    same = deployopt("compare", run_folder, run_folder, "--max-latency-regression", "5%")
    assert same.returncode == 0, same.stderr
    assert "2 same within noise" in same.stdout
    document = json.loads((run_folder / "report.json").read_text())
    slower = run_folder / "slower"
    slower.mkdir()
    for row in document["rows"]:
        host = row["latency_ms"]["host"]
        row["latency_ms"]["host"] = {**host, "p50": 3 * host["p50"], "p50_ci95": [3 * bound for bound in host["p50_ci95"]]}
    (slower / "report.json").write_text(json.dumps(document))
    missed = deployopt("compare", run_folder, slower, "--max-latency-regression", "5%")
    assert missed.returncode == 1, missed.stderr
    assert "2 slower" in missed.stdout


def test_bench_ends_in_the_code_of_its_worst_row(tmp_path: Path, model: Path) -> None:
    fixed = onnx.load(model)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(fixed, tmp_path / "fixed.onnx")
    done = deployopt("bench", model, tmp_path / "fixed.onnx", "--batch", "2", "--seconds", "0.1", "--quiet", "--json", "--threads", "1")
    assert done.returncode == 4, done.stderr
    good, bad = json.loads(done.stdout)
    assert good["latency_ms"] is not None
    assert bad["status"] == "failed"
    assert "takes [1, 3, 8, 8], found images of [2, 3, 8, 8]" in bad["reason"]


@pytest.mark.parametrize(
    ("name", "code", "said"), [("model.tflite", 2, "known: .onnx"), ("empty.onnx", 4, "holds no graph"), ("absent.onnx", 2, "found nothing")]
)
def test_bench_refuses_what_is_no_artifact(tmp_path: Path, name: str, code: int, said: str) -> None:
    if not name.startswith("absent"):
        (tmp_path / name).write_bytes(b"")
    done = deployopt("bench", tmp_path / name)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_bench_profiles_layers(model: Path) -> None:
    done = deployopt("bench", model, "--seconds", "0.1", "--profile", "--json", "--quiet", "--threads", "1")
    assert done.returncode == 0, done.stderr
    (profile,) = [row["profile"] for row in json.loads(done.stdout)]
    assert [layer["nodes"] for layer in profile["layers"] if layer["kind"] == "MatMul"] == [["output"]]
    assert profile["precision_us"]["fp32"] == pytest.approx(profile["total_us"], abs=0.1)


def test_bench_profiles_no_streams(model: Path) -> None:
    done = deployopt("bench", model, "--profile", "--scenario", "offline")
    assert done.returncode == 2
    assert "one inference at a time" in done.stderr
    assert "leave out --profile or --scenario" in done.stderr


def test_bench_takes_no_profile_unasked(rows: list[dict[str, Any]]) -> None:
    assert [row["profile"] for row in rows] == [None, None]


def test_a_rerun_tells_how_it_was_measured(tmp_path: Path) -> None:
    run = stored_runs.around(linear(tmp_path / "linear.onnx"))
    done = deployopt("compare", run, run, "--rerun", "--lifetimes", "3", "--budget", "0", "--seconds", "0.1", "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (row,) = result["rows"]
    assert (row["lifetimes"], row["threads"], row["device"]) == (3, 1, "cpu")
    told = result["rerun"]
    assert (told["lifetimes"], told["precision"], told["budget_s"], told["seconds"], told["threads"]) == (3, 0.01, 0.0, 0.1, 1)
    assert told["images"].startswith("synthetic")
    assert any(result["environment"]["versions"][name] for name in ("onnxruntime", "onnxruntime-gpu"))
