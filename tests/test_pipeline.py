"""The whole chain on a tiny network, as processes: killed and resumed, damaged and mended, cached and explained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deployopt import load_recipe, pipeline
from deployopt.errors import RecipeError, UsageError

RECIPE = """\
name: tiny
model: {arch: resnet20, stem: cifar}
data: {name: digits, image_size: 8}
stages:
  - finetune: {epochs: 2, batch_size: 128}
  - prune: {target: {macs_ratio: 0.5}, round_to: 4, if_not_faster: ignore, finetune: {epochs: 1}}
  - qat: {epochs: 1}
  - export
  - build: {backends: [onnxruntime, openvino, tensorrt, tensorrt_rtx]}
  - benchmark: {min_seconds: 0.05, max_contention: 10, max_steal_percent: 100, max_spread: 10}
"""
FLOAT = ["fp32", "fp16", "bf16"]
MODELS = ("init", "00-finetune", "01-prune", "02-qat", "03-export-finetune", "03-export-prune", "03-export-qat")


def start(recipe: Path, folder: Path, cache: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "deployopt", "run", str(recipe), "--run-dir", str(folder), "--threads", "1", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "XDG_CACHE_HOME": str(cache)})


def run(recipe: Path, folder: Path, cache: Path, *arguments: str) -> dict[str, Any]:
    with start(recipe, folder, cache, *arguments) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    document: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return document


def cached(document: dict[str, Any]) -> set[str]:
    return {step["id"] for step in document["steps"] if step["cached"]}


def weights(folder: Path) -> dict[str, str]:
    """sha256 of every file of every model, by step: what must be bit-identical."""
    return {step: json.loads((folder / step / "DONE").read_text())["files"] for step in MODELS if not step.startswith("03")}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(recipe: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One uninterrupted run."""
    folder = tmp_path_factory.mktemp("run")
    return folder, run(recipe, folder, cache)


def test_a_run_measures_what_runs_and_says_why_the_rest_does_not(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, document = finished
    assert [v["name"] for v in document["variants"]] == ["finetune", "prune", "qat"]
    dense, pruned, quantized = document["variants"]
    assert pruned["macs"] <= 0.5 * dense["macs"]
    assert quantized["accuracy"]["n"] == document["dataset"]["test"]
    rows = {f"{r['variant']}/{r['backend']}/{r['precision']}": r for r in document["rows"]}
    measured = ["finetune/torch/fp32", "prune/torch/fp32", "qat/torch/fp32"]
    measured += [row for b in ("onnxruntime", "openvino") for row in (f"finetune/{b}/fp32", f"prune/{b}/fp32", f"qat/{b}/int8")]
    for name in measured:
        assert rows[name]["status"] == "ok", rows[name]["reason"]
        assert rows[name]["latency_ms"]["host"]["p50"] > 0
        assert rows[name]["contract"]["blocks"] >= 20
    for backend in ("onnxruntime", "openvino", "tensorrt_rtx"):
        verified = rows[f"qat/{backend}/int8"]["verified"]
        assert verified["quantized_layers"] == verified["quantizable_layers"] == 22  # 19 + 2 shortcut convolutions + the classifier, all of them
    for row in (f"{v}/tensorrt_rtx/{p}" for v, ps in (("finetune", FLOAT), ("prune", FLOAT), ("qat", ["int8"])) for p in ps):
        assert rows[row]["status"] in {"built", "ok"}, rows[row]["reason"]  # ok where there is a GPU
        assert rows[row]["artifact"]["bytes"] > 0
    assert rows["qat/tensorrt/int8"]["status"] == "unavailable"
    assert "tensorrt" in rows["qat/tensorrt/int8"]["reason"]
    assert {p.name for p in folder.iterdir()} >= {"recipe.yaml", "environment.json", "report.json", "report.md", "report.html", "log.txt", "00-finetune"}


def test_the_report_names_no_machine_path_or_variable(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    for name in ("report.json", "environment.json", "report.md", "report.html"):
        text = (folder / name).read_text()
        for secret in (str(Path.home()), str(folder.parent), os.uname().nodename, "XDG_CACHE_HOME"):
            assert secret not in text, f"{name} holds {secret}"


def test_the_second_run_reuses_models_and_measures_anew(recipe: Path, cache: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    first_folder, first = finished
    second = run(recipe, tmp_path / "second", cache)
    assert set(MODELS) <= cached(second)
    assert "05-benchmark" not in cached(second)
    assert weights(tmp_path / "second") == weights(first_folder)
    timed = [(a, b) for a, b in zip(first["rows"], second["rows"], strict=True) if a["status"] == "ok"]
    assert timed
    assert all(a["contract"]["started"] < b["contract"]["started"] for a, b in timed)


def test_a_plan_names_what_reruns_and_why(recipe: Path, cache: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    made = pipeline.plan(load_recipe(recipe, ["stages.qat.lr=0.001"]), threads=1, cache_home=cache / "deployopt")
    steps = {s.id: s for s in made.steps}
    before_qat = {s.id for s in made.steps if s.runnable and "qat" not in s.id and s.stage_name != "benchmark"}
    assert {"init", "01-prune", "03-export-prune", "04-build-prune-onnxruntime-fp32", "04-build-prune-tensorrt_rtx-fp16"} <= before_qat
    assert {s.id for s in made.steps if s.cached} == before_qat
    assert steps["02-qat"].why == "config.lr: 0.005 → 0.001"
    assert steps["03-export-qat"].why == "an input changed"
    assert steps["04-build-qat-tensorrt-int8"].expansion.why_not
    assert steps["02-qat"].seconds is not None
    assert made.seconds is not None


def test_a_flipped_byte_is_recomputed_and_what_follows_is_kept(recipe: Path, cache: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    first_folder, _ = finished
    before = weights(first_folder)
    key = json.loads((first_folder / "01-prune" / "DONE").read_text())["key"]
    model = cache / "deployopt" / "steps" / key / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.unlink()  # the run folder's hard link keeps the good bytes
    model.write_bytes(data)
    again = run(recipe, tmp_path / "again", cache)
    assert "01-prune" not in cached(again)
    assert {"00-finetune", "02-qat", "03-export-prune"} <= cached(again)  # the same weights came out, so nothing after it changed
    assert weights(tmp_path / "again") == before


@pytest.mark.slow  # a run killed at five points: about a minute
def test_killed_at_any_moment_a_run_goes_on_and_ends_with_the_same_weights(recipe: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, cache = tmp_path / "run", tmp_path / "cache"
    for step in ("00-finetune", "01-prune", "02-qat", "03-export-qat", "05-benchmark"):
        done_before = finished_steps(folder)
        with start(recipe, folder, cache) as process:
            wait_for(folder / "log.txt", f"{step}: started", process)
            time.sleep(4 if step == "05-benchmark" else 0.5)  # long enough for sessions to be open
            process.send_signal(signal.SIGKILL)
        log = (folder / "log.txt").read_text().splitlines()
        assert not any(f"{s}: not cached" in line for line in log[len_of_previous(log) :] for s in done_before), "a finished step ran again"
    document = run(recipe, folder, cache)
    assert {"init", "00-finetune", "01-prune", "02-qat"} <= cached(document)
    assert weights(folder) == weights(finished[0])
    assert not list((cache / "deployopt" / "steps").glob("*.partial"))


def finished_steps(folder: Path) -> set[str]:
    return {p.parent.name for p in folder.glob("*/DONE")}


def len_of_previous(log: list[str]) -> int:
    """Lines of earlier processes: the last process begins where `init` is named last."""
    return max(i for i, line in enumerate(log) if " init: " in line)


def wait_for(log: Path, text: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    seen = log.read_text().count(text) if log.exists() else 0
    while not (log.exists() and log.read_text().count(text) > seen):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"'{text}' never came"
        time.sleep(0.05)


def test_two_runs_in_one_folder_the_second_is_refused(recipe: Path, cache: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    with start(recipe, folder, cache) as first:
        wait_for(folder / "log.txt", "init: started", first)
        with start(recipe, folder, cache) as second:
            _, err = second.communicate(timeout=60)
        assert second.returncode == 2
        assert f"process {first.pid}" in err
        assert "Traceback" not in err
        first.kill()


def test_ctrl_c_ends_with_130_and_the_command_that_resumes(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with start(recipe, folder, tmp_path / "cache") as process:
        wait_for(folder / "log.txt", "00-finetune: started", process)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"deployopt run {recipe} --run-dir {folder} --threads 1\n" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", sorted(p.name for p in (Path(__file__).parent.parent / "recipes").glob("*.yaml")))
def test_every_shipped_recipe_plans(name: str, repository: Path) -> None:
    made = pipeline.plan(load_recipe(repository / "recipes" / name))
    stages = [s.stage_name for s in made.steps]
    assert stages[0] == "init"
    assert {"finetune", "prune", "qat", "export", "build", "benchmark"} <= set(stages)
    assert pipeline.validate(repository / "recipes" / name) == []


def test_the_schema_beside_the_recipes_is_what_schema_prints(repository: Path) -> None:
    import jsonschema
    from ruamel.yaml import YAML

    schema = pipeline.schema()
    assert json.loads((repository / "recipes" / "recipe.schema.json").read_text()) == schema, "run `make schema`"
    for path in (repository / "recipes").glob("*.yaml"):
        jsonschema.validate(YAML(typ="safe").load(path), schema)
        assert path.read_text().startswith("# yaml-language-server: $schema=./recipe.schema.json\n")


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("- qat\n  - prune", "'prune' cannot come after 'qat'"),
        ("- build\n  - export", "'build' needs 'export' before it"),
        ("- export\n  - benchmark", "'benchmark' needs 'build' before it"),
        ("- init", "planned by itself"),
        ("- build: {backends: [tensort]}", "did you mean 'tensorrt'"),
    ],
)
def test_impossible_orders_are_refused_where_they_stand(tmp_path: Path, stages: str, said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"name: r\nmodel: {{arch: resnet20, stem: cifar}}\ndata: {{name: digits}}\nstages:\n  {stages}\n")
    with pytest.raises(RecipeError, match=said) as caught:
        pipeline.plan(load_recipe(path))
    assert all(p.line >= 5 for p in caught.value.problems)


def test_a_run_that_ends_before_it_measures_judges_no_budget(recipe: Path, tmp_path: Path) -> None:
    document = run(recipe, tmp_path / "run", tmp_path / "cache", "--until", "init", "--set", "budget.min_speedup=2")  # asserts exit code 0
    assert document["rows"] == []
    assert document["budget"]["met"] is True


def test_a_name_is_part_of_the_key(recipe: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed.yaml"
    renamed.write_text(RECIPE.replace("  - finetune: {epochs: 2, batch_size: 128}", "  - finetune: {epochs: 2, batch_size: 128}\n    as: dense"))
    plain, other = (pipeline.plan(load_recipe(p), threads=1).steps for p in (recipe, renamed))
    assert plain[0].key == other[0].key
    assert plain[1].key != other[1].key  # the name seeds the order of the images


def test_where_the_data_lie_is_not_part_of_the_key(tmp_path: Path) -> None:
    from deployopt.data.imagefolder import Config

    assert Config(folder="a", image_size=32).keyed() == Config(folder="b", image_size=32).keyed()
    assert Config(folder="a", image_size=32).keyed() != Config(folder="a", image_size=64).keyed()


def test_a_plan_is_made_without_the_data_or_their_package(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deployopt.data import digits
    from deployopt.errors import MissingDependency

    def absent(config: object) -> str:
        raise MissingDependency("sklearn", "train", "to load the digits")

    monkeypatch.setattr(digits, "fingerprint", absent)
    made = pipeline.plan(load_recipe(recipe))
    assert isinstance(made.data_problem, MissingDependency)
    assert not any(s.cached for s in made.steps)


def test_a_folder_that_is_no_run_of_this_recipe_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("precious")
    other = tmp_path / "other"
    other.mkdir()
    (other / "recipe.yaml").write_text(RECIPE.replace("name: tiny", "name: large"))
    planned = pipeline.plan(load_recipe(recipe))
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        pipeline.execute(planned, mine)
    with pytest.raises(UsageError, match="'large', not of 'tiny'"):
        pipeline.execute(planned, other)
    assert (mine / "thesis.tex").read_text() == "precious"


def test_problems_of_all_sections_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: r\nseed: -1\nmodel: {arch: resnet19}\ndata: {name: digits, image_sise: 32}\nstages:\n  - finetune: {epoch: 3}\n  - prone\n")
    problems = pipeline.validate(path)
    assert sorted({p.line for p in problems}) == [2, 3, 4, 6, 7]


def test_the_extras_that_doctor_knows_are_those_of_the_package(repository: Path) -> None:
    import tomllib

    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, packages in pipeline.EXTRAS.items():
        declared = {r.split(";")[0].split(">")[0].strip() for r in extras[extra]}
        assert set(packages) == declared - {"onnxruntime", "onnxruntime-gpu"}  # one of these two, by platform
