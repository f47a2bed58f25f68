"""The command line as a user meets it: in a process of its own, by exit code, stdout and stderr."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = ("torch", "torchvision", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "sklearn", "scipy", "PIL")
RECIPE = """
name: tiny
model: {arch: resnet8, stem: cifar}
data: {name: digits, image_size: 8}
stages:
  - finetune: {epochs: 1}
  - export
"""


def deployopt(*arguments: str, cwd: Path | None = None, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deployopt", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        timeout=120,
        check=False,
    )


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize("arguments", [["--help"], ["validate", "RECIPE"], ["schema"], ["list"], ["plan", "RECIPE"]])
def test_light_commands_load_neither_torch_nor_a_runtime(recipe: Path, arguments: list[str]) -> None:
    heavy = HEAVY if arguments[0] != "plan" else ("torch", "torchvision", "sklearn")  # a plan asks each runtime whether it is there
    code = (
        "import sys; sys.argv = ['deployopt', *sys.argv[1:]]\n"
        "from deployopt.cli import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        f"print('loaded:', sorted(set({heavy!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *[str(recipe) if a == "RECIPE" else a for a in arguments]], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.strip().splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize("arguments", [["--help"], ["validate", "RECIPE"]])
def test_light_commands_take_little_longer_than_their_libraries(recipe: Path, arguments: list[str]) -> None:
    """0.4 s on a quiet 2.4 GHz core is about 1.6 times what importing typer and pydantic takes; the ratio also holds on a busy machine."""

    def seconds(command: list[str]) -> float:
        began = time.perf_counter()
        subprocess.run(command, env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""}, capture_output=True, check=True, timeout=60)
        return time.perf_counter() - began

    command = [sys.executable, "-m", "deployopt", *[str(recipe) if a == "RECIPE" else a for a in arguments]]
    libraries = [sys.executable, "-c", "import typer, pydantic; pydantic.create_model('M', x=(int, 0)); typer.Typer()"]
    seconds(command)  # a user's first call compiles, the next ones do not
    pairs = [(seconds(command), seconds(libraries)) for _ in range(9)]
    assert statistics.median(ours / theirs for ours, theirs in pairs) < 1.9


def test_validate_says_ok_and_names_every_problem(recipe: Path) -> None:
    assert deployopt("validate", str(recipe)).stdout == f"{recipe}: ok\n"
    recipe.write_text(RECIPE.replace("epochs: 1", "epoch: 1").replace("resnet8", "resnet19"))
    done = deployopt("validate", str(recipe))
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"{recipe}:3:" in done.stderr
    assert "resnet18" in done.stderr  # did you mean
    assert f"{recipe}:6:" in done.stderr
    assert "did you mean 'epochs'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["run", "RECIPE", "--device", "tpu"], 2, "unknown device 'tpu'"),
        (["run", "RECIPE", "--device", "cuda:99"], 3, "cuda:99"),
        (["run", "RECIPE", "--run-dir", "/proc/nowhere"], 3, "/proc/nowhere"),
        (["run", "RECIPE", "--run-dir", "RECIPE"], 3, "--run-dir"),
        (["run", "RECIPE", "--until", "exprt"], 2, "did you mean 'export'"),
        (["run", "RECIPE", "--set", "stages.finetune.lr=fast"], 2, "--set stages.finetune.lr"),
        (["run", "RECIPE", "--set", "data.name=imagefolder", "--set", "data.folder=nowhere", "--set", "data.image_size=32"], 3, "nowhere"),
        (["report", "nowhere"], 2, "nowhere"),
        (["bench", "nowhere.onnx"], 2, "nowhere.onnx"),
        (["bench", "RECIPE"], 2, ".onnx"),
        (["compare", "a", "b", "--max-latency-regression", "much"], 2, "--max-latency-regression"),
        (["compare", "a", "b", "--max-latency-regression", "0.05"], 2, "found '0.05'\n  → write 5% or 0.05%"),
        (["compare", "a", "b", "--max-size-regression", "1"], 2, "write 1%"),
        (["compare", "a", "b", "--max-accuracy-drop", "0.5"], 2, "write 0.5pp\n"),
        (["cache", "prune", "--max-size", "big"], 2, "--max-size"),
        (["list", "stagse"], 2, "stagse"),
    ],
)
def test_what_cannot_be_meant_or_is_lacking_ends_in_its_exit_code(recipe: Path, arguments: list[str], code: int, said: str) -> None:
    done = deployopt(*[str(recipe) if a == "RECIPE" else a for a in arguments], cwd=recipe.parent)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "to go on" not in done.stderr  # nothing began


def left_early(*arguments: str, stream: str) -> tuple[int, str]:
    """Exit code and the other stream of a command whose reader of `stream` closes it at once, as `| head -0` does."""
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    done = subprocess.run([sys.executable, "-m", "deployopt", *arguments], **streams, text=True, timeout=120, check=False)
    os.close(writer)
    return done.returncode, done.stderr if stream == "stdout" else done.stdout


def test_a_reader_that_leaves_early_changes_no_exit_code(recipe: Path, tmp_path: Path) -> None:
    assert left_early("schema", stream="stdout") == (0, "")
    assert left_early("plan", str(recipe), stream="stdout") == (0, "")
    until = ("run", str(recipe), "--run-dir", str(tmp_path / "run"), "--until", "init", "--json")
    assert left_early(*until, stream="stdout")[0] == 0
    assert left_early(*until, stream="stderr")[0] == 130  # the run ended before its report


def test_plan_says_what_would_run(recipe: Path) -> None:
    done = deployopt("plan", str(recipe), "--json")
    steps = {s["id"]: s for s in json.loads(done.stdout)["steps"]}
    assert set(steps) == {"init", "00-finetune", "01-export-finetune"}
    assert all(s["why"] == "not run before" for s in steps.values())
    assert "not run before" in deployopt("plan", str(recipe)).stdout


def test_list_and_doctor_speak_json() -> None:
    names = json.loads(deployopt("list", "--json").stdout)
    assert {"finetune", "prune", "qat", "export", "build", "benchmark"} <= set(names["stages"])
    assert {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"} <= set(names["backends"])
    facts = json.loads(deployopt("doctor", "--json").stdout)
    assert facts["backends"]["onnxruntime"]["runs"] is True
    assert facts["backends"]["tensorrt"]["reason"]
    assert deployopt("doctor", environment={"NO_COLOR": "1", "COLUMNS": "100"}).stdout.count("\x1b") == 0


def test_cache_commands(recipe: Path, own_cache: Path) -> None:
    assert deployopt("cache", "dir").stdout.strip() == str(own_cache)
    assert json.loads(deployopt("cache", "ls", "--json").stdout) == []
    assert "removed 0 steps" in deployopt("cache", "prune", "--max-size", "0").stdout
