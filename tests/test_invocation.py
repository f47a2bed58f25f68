"""Stages that train run in N processes: planned, keyed, repeatable, and gone when the run is."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributions import install

from deployopt import load_recipe, pipeline
from deployopt.errors import BackendUnavailable, DeviceUnavailable, RecipeError, UsageError
from deployopt.nn import checkpoint
from deployopt.runtime import cuda

RECIPE = """\
name: tiny
model: {arch: resnet8, stem: cifar}
data: {name: digits, image_size: 8}
stages:
  - finetune: {epochs: 1, batch_size: 128, warmup_epochs: 0}
  - prune: {target: {macs_ratio: 0.5}, round_to: 4, if_not_faster: ignore, finetune: {epochs: 1, batch_size: 128, warmup_epochs: 0}}
  - qat: {epochs: 1, batch_size: 128}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def start(recipe: Path, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "deployopt", "run", str(recipe), "--run-dir", str(folder), "--threads", "2", "--nproc", "2", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(recipe: Path, folder: Path, *arguments: str) -> tuple[int, str]:
    with start(recipe, folder, *arguments) as process:
        _, err = process.communicate(timeout=500)
    return process.returncode, err


def weights(folder: Path, *steps: str) -> list[str]:
    return [hashlib.sha256((folder / step / "model.safetensors").read_bytes()).hexdigest() for step in steps]


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def training_ranks(process: subprocess.Popen[str], folder: Path) -> list[int]:
    """The two processes, once both have met and train."""
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "deployopt" / "steps"
    deadline = time.monotonic() + 120
    while not (list(cache.glob("*.partial/.ranks/rendezvous")) and len(children(process)) == 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    return children(process)


def gone(pid: int) -> bool:
    """Within ten seconds; a zombie that its new parent has not reaped counts."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow  # three trainings, the first of them twice
def test_every_stage_that_trains_does_in_two_processes_and_repeats_its_bits(recipe: Path, tmp_path: Path) -> None:
    code, err = run(recipe, tmp_path / "first")
    assert code == 0, err
    for step in ("00-finetune", "01-prune", "02-qat"):
        network = checkpoint.load(tmp_path / "first" / step)
        assert all(bool(value.isfinite().all()) for value in network.state_dict().values())
        assert not (tmp_path / "first" / step / ".ranks").exists()
    again, err = run(recipe, tmp_path / "second", "--fresh", "--until", "finetune")
    assert again == 0, err
    assert weights(tmp_path / "second", "00-finetune") == weights(tmp_path / "first", "00-finetune")
    steps = {s.id: s for s in pipeline.plan(load_recipe(recipe), threads=2).steps}
    assert steps["init"].cached
    assert steps["00-finetune"].why == "processes: 2 → 1"


@pytest.mark.slow  # two runs of three processes
@pytest.mark.parametrize(
    ("override", "code", "said"),
    [
        ("stages.finetune.batch_size=3", 2, "2 processes need batches of at least 4 images"),
        ("stages.finetune.lr=1e30", 4, "became"),
    ],
)
def test_what_a_rank_raises_ends_the_run_with_its_class(recipe: Path, tmp_path: Path, override: str, code: int, said: str) -> None:
    ended, err = run(recipe, tmp_path / "run", "--set", override)
    assert ended == code, err
    assert said in err
    assert "Traceback" not in err


@pytest.mark.slow  # three runs of at least three processes
@pytest.mark.parametrize("who", ["rank", "run", "terminal"])
def test_none_outlives_the_others(recipe: Path, tmp_path: Path, who: str) -> None:
    with start(recipe, tmp_path / "run", "--set", "stages.finetune.epochs=10000") as process:
        ranks = training_ranks(process, tmp_path / "run")
        if who == "terminal":
            process.send_signal(signal.SIGINT)
        else:
            os.kill(ranks[1] if who == "rank" else process.pid, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert all(gone(pid) for pid in ranks)
    assert process.returncode == {"rank": 4, "run": -signal.SIGKILL, "terminal": 130}[who], err
    if who == "rank":
        assert "finetune in 2 processes: the process was ended by SIGKILL" in err
    if who != "run":
        assert "--threads 2 --nproc 2\n" in err  # the command that resumes


def test_more_processes_than_threads_or_gpus_are_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"--nproc 3 needs a CPU thread for each process, found 2"):
        pipeline.plan(load_recipe(recipe), device="cpu", threads=2, processes=3)
    monkeypatch.setattr(cuda, "find_gpus", lambda: [cuda.Gpu("first", "8.6", "13.0"), cuda.Gpu("second", "8.9", "13.0")])
    assert pipeline.plan(load_recipe(recipe), threads=2, processes=2).device == "cuda:0"
    for device, free in (("cuda", 2), ("auto", 2), ("cuda:1", 1)):
        with pytest.raises(DeviceUnavailable, match=f"(?s)one a process; found {free} .*--nproc {free}, or --device cpu"):
            pipeline.plan(load_recipe(recipe), device=device, threads=3, processes=3)


def test_of_two_gpus_builds_are_keyed_by_the_one_that_is_built_for(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_gpus", lambda: [cuda.Gpu("first", "8.6", "13.0"), cuda.Gpu("second", "8.9", "13.0")])
    recipe.write_text(RECIPE + "  - export: {precisions: [fp32, int8]}\n  - build: {backends: [onnxruntime]}\n")
    first, second, default = (pipeline.plan(load_recipe(recipe), device=device).steps for device in ("cuda:0", "cuda:1", "cuda"))
    pairs = [(s, other) for s, other in zip(first, second, strict=True) if s.key is not None]
    assert {s.stage_name for s, other in pairs if s.parts.get("machine") != other.parts.get("machine")} == {"build"}
    assert all(s.key != other.key for s, other in pairs if s.stage_name == "build")
    assert [s.key for s in first] == [s.key for s in default]


def test_a_gpu_that_is_asked_for_and_not_there_says_why(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> list[cuda.Gpu]:
        raise BackendUnavailable("no NVIDIA driver (libcuda.so.1 not found)")

    monkeypatch.setattr(cuda, "find_gpus", none)
    assert pipeline.choose_device("auto") == "cpu"
    with pytest.raises(DeviceUnavailable, match=r"wanted cuda:0, found 0 NVIDIA GPUs with a working driver: no NVIDIA driver \(libcuda"):
        pipeline.choose_device("cuda:0")


def test_only_steps_that_train_are_keyed_by_the_processes(recipe: Path) -> None:
    one, two = (pipeline.plan(load_recipe(recipe), device="cpu", threads=2, processes=n).steps for n in (1, 2))
    own = [s.id for s, other in zip(one, two, strict=True) if s.parts.get("processes") != other.parts.get("processes")]
    assert own == ["00-finetune", "01-prune", "02-qat"]
    assert one[0].key == two[0].key


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed stages: `mimic`, which trains from scratch as finetune does, and `hollow`, which is none."""
    hollow = "from deployopt.stages.finetune import Config, after, cacheable, distributions, expand, not_after, run, timed, version\n"
    modules = {"mimic": "from deployopt.stages.finetune import *\n", "hollow": hollow}
    install(tmp_path, "trainers", "[deployopt.stages]\nmimic = trainers.mimic\nhollow = trainers.hollow\n", modules)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_third_partys_trainer_is_treated_as_finetune(recipe: Path, third_party: None) -> None:
    recipe.write_text(RECIPE.replace("- finetune: {", "- mimic: {"))
    init, mimic, *_ = pipeline.plan(load_recipe(recipe), device="cpu", threads=2, processes=2).steps
    assert not init.expansion.makes[0].fans_out
    assert mimic.parts["processes"] == 2
    recipe.write_text(RECIPE.replace("  - finetune: {epochs: 1, batch_size: 128, warmup_epochs: 0}\n", ""))
    given = load_recipe(recipe, ["model.weights=trained.pth"])
    assert pipeline.plan(given).steps[0].expansion.makes[0].fans_out  # nothing trains from scratch: the network given is measured


def test_a_module_that_lacks_attributes_is_no_stage(recipe: Path, third_party: None) -> None:
    recipe.write_text(RECIPE.replace("- finetune: {", "- hollow: {"))
    with pytest.raises(RecipeError, match=r"tiny\.yaml:5:5: .*'hollow' is no stage: it lacks from_scratch, trains"):
        pipeline.plan(load_recipe(recipe))
