"""A whole run of a tiny network, as a process: what it measures and reports, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from cli_runs import HURRIED, TINY, Finished, logged, run, start, wait_for
from distributions import install

from deployopt import load_recipe, pipeline, store
from deployopt.errors import UsageError
from deployopt.runtime.process import interrupts_kept
from deployopt.stages import init

FLOAT = ["fp32", "fp16", "bf16"]


def test_a_run_measures_what_runs_and_says_why_the_rest_does_not(finished: Finished) -> None:
    document = finished.document
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
        assert verified["quantized_layers"] == verified["quantizable_layers"] == 10  # 7 + 2 shortcut convolutions + the classifier, all of them
    for row in (f"{v}/tensorrt_rtx/{p}" for v, ps in (("finetune", FLOAT), ("prune", FLOAT), ("qat", ["int8"])) for p in ps):
        assert rows[row]["status"] in {"built", "ok"}, rows[row]["reason"]  # ok where there is a GPU
        assert rows[row]["artifact"]["bytes"] > 0
        assert rows[row]["verified"]["executed"] == {row.rpartition("/")[2]: 10}
    assert rows["qat/tensorrt/int8"]["status"] == "unavailable"
    assert "tensorrt" in rows["qat/tensorrt/int8"]["reason"]
    names = {p.name for p in finished.folder.iterdir()}
    assert names >= {"recipe.yaml", "environment.json", "report.json", "report.md", "report.html", "log.txt", "00-finetune"}


def test_the_report_names_no_machine_path_or_variable(finished: Finished) -> None:
    for name in ("report.json", "environment.json", "report.md", "report.html"):
        text = (finished.folder / name).read_text()
        for secret in (str(Path.home()), str(finished.folder.parent), os.uname().nodename, "XDG_CACHE_HOME"):
            assert secret not in text, f"{name} holds {secret}"


def test_two_runs_in_one_folder_the_second_is_refused(recipe: Path, tmp_path: Path) -> None:
    folder, cache = tmp_path / "shared", tmp_path / "cache"
    with start(recipe, folder, cache) as first:
        wait_for(logged(folder / "log.txt", "init: started"), first)
        with start(recipe, folder, cache) as second:
            _, err = second.communicate(timeout=60)
        assert second.returncode == 2
        assert f"process {first.pid}" in err
        assert "Traceback" not in err
        first.kill()


def test_ctrl_c_ends_with_130_and_the_command_that_resumes(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with start(recipe, folder, tmp_path / "cache", "--fresh") as process:
        wait_for(logged(folder / "log.txt", "00-finetune: started"), process)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"deployopt run {recipe} --run-dir {folder} --threads 1\n  (without --fresh, which would begin again;" in err
    assert "interrupted\n" in err
    assert "Traceback" not in err


def test_ctrl_c_that_makes_a_library_fail_is_ctrl_c(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("trying to pop from empty mode stack")

    monkeypatch.setattr(init, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.execute(pipeline.plan(load_recipe(recipe)), tmp_path / "run", fresh=True)
    assert "the run ended" not in (tmp_path / "run" / "log.txt").read_text()


def test_a_run_that_ends_before_it_measures_judges_no_budget(recipe: Path, tmp_path: Path) -> None:
    document = run(recipe, tmp_path / "run", tmp_path / "cache", "--until", "init", "--set", "budget.min_speedup=2")  # asserts exit code 0
    assert document["rows"] == []
    assert document["budget"]["met"] is True


def test_interrupts_are_found_behind_any_link_and_cycles_end() -> None:
    def raised(error: BaseException) -> None:
        with interrupts_kept():
            raise error

    behind, looped = RuntimeError("y"), ValueError("a")
    behind.__cause__, behind.__context__ = ValueError("x"), KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        raised(behind)
    looped.__cause__ = looped
    with pytest.raises(ValueError, match="a"):
        raised(looped)


LOPSIDED = """
from torch import nn

def lopsided(num_outputs, channels):
    \"\"\"Its second convolution is padded by one more on one side than on the other, which nothing quantises.\"\"\"
    body = [nn.Conv2d(channels, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 4, padding="same"), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(16, num_outputs))
"""


def test_layers_that_do_not_run_in_int8_miss_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "shapes", "[deployopt.models]\nlopsided = shapes.nets:lopsided\n", {"nets": LOPSIDED})
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    recipe = tmp_path / "lopsided.yaml"
    recipe.write_text(
        f"name: lopsided\nmodel: {{arch: lopsided}}\ndata: {{name: digits, image_size: 8}}\nstages:\n  - finetune: {{epochs: 1}}\n  - ptq\n"
        f"  - export: {{precisions: [int8]}}\n  - build: {{backends: [onnxruntime, openvino]}}\n  - benchmark: {json.dumps(HURRIED)}\n"
        "budget: {min_quantized_layers: 1.0}\n"
    )
    document = run(recipe, tmp_path / "run", tmp_path / "cache", exit_codes=(1,))
    rows = {r["backend"]: r for r in document["rows"] if r["precision"] == "int8"}
    for backend in ("onnxruntime", "openvino"):
        assert (rows[backend]["verified"]["quantized_layers"], rows[backend]["verified"]["quantizable_layers"]) == (2, 3)
        assert "only 2 of 3 layers run in INT8 (1 in fp32, 2 in int8)" in rows[backend]["notes"]
    missed = [v for v in document["budget"]["violations"] if v["limit"] == "min_quantized_layers"]
    assert [v["found"] for v in missed] == [pytest.approx(2 / 3)] * 2


def test_a_run_prunes_the_cache_and_spares_what_it_used(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    cache = store.Cache()
    with cache.holding("other"), cache.writing("other") as folder:
        (folder / "model.bin").write_bytes(bytes(1000))
        cache.commit(folder, "other", {"stage": "finetune", "label": ""}, (), 1.0)
    planned = pipeline.plan(load_recipe(recipe), until="init", threads=1)
    monkeypatch.setenv("DEPLOYOPT_CACHE_MAX_SIZE", "much")
    with pytest.raises(UsageError, match="DEPLOYOPT_CACHE_MAX_SIZE"):
        pipeline.execute(planned, tmp_path / "run")
    monkeypatch.setenv("DEPLOYOPT_CACHE_MAX_SIZE", "0")
    pipeline.execute(planned, tmp_path / "run")
    assert [e.key for e in cache.entries()] == [planned.steps[0].key]


def test_a_folder_that_is_no_run_of_this_recipe_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("precious")
    other = tmp_path / "other"
    other.mkdir()
    (other / "recipe.yaml").write_text(TINY.replace("name: tiny", "name: large"))
    planned = pipeline.plan(load_recipe(recipe))
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        pipeline.execute(planned, mine)
    with pytest.raises(UsageError, match="'large', not of 'tiny'"):
        pipeline.execute(planned, other)
    assert (mine / "thesis.tex").read_text() == "precious"


BROKEN = """\
from deployopt.artifact import Availability
from deployopt.errors import BuildFailed

distributions, build_depends_on_machine = (), False


def probe():
    return Availability(True, True, "1.0", "CPU", None, {"fp32": None})


def prepare(canonical, precision, out):
    raise BuildFailed("this backend builds nothing", "take another")
"""
ABSENT = BROKEN.replace('Availability(True, True, "1.0", "CPU", None', 'Availability(False, False, None, None, "its runtime is not installed"')


@pytest.mark.parametrize(("backend", "code", "said"), [("broken", 4, "this backend builds nothing\n  → take another"), ("absent", 3, "not installed")])
def test_a_run_without_anything_to_deploy_ends_in_the_code_of_its_cause(
    recipe: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, code: int, said: str
) -> None:
    install(tmp_path, "vendor", "[deployopt.backends]\nbroken = vendor.broken\nabsent = vendor.absent\n", {"broken": BROKEN, "absent": ABSENT})
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    options = ("--set", f"stages.build.backends=[{backend}]", "--until", "build")
    with start(recipe, tmp_path / "run", cache, *options) as process:
        _, err = process.communicate(timeout=200)
    assert process.returncode == code, err
    found = "2 failed, 5 unavailable" if code == 4 else "7 unavailable"
    assert f"error: wanted an artifact to deploy, found {found}; 04-build-finetune-{backend}-fp32" in err
    assert said in err
    assert "to go on from the last finished step: deployopt run" in err
    assert "Traceback" not in err


@pytest.mark.slow  # half a minute
def test_a_recipe_starts_from_a_variant_of_an_earlier_run(cache: Path, finished: Finished, tmp_path: Path) -> None:
    start = tmp_path / "start.yaml"
    head = f"name: again\nmodel: {{arch: resnet8, weights: {finished.folder / '02-qat'}}}\ndata: {{name: digits, image_size: 8}}\nstages:\n"
    start.write_text(head + "  - export\n  - build: {backends: [onnxruntime]}\n")
    document = run(start, tmp_path / "again", cache)
    (variant,), quantized = document["variants"], finished.document["variants"][-1]
    assert (variant["family"], variant["params"], variant["accuracy"]) == ("int8", quantized["params"], quantized["accuracy"])
    assert [(s["label"], s["status"]) for s in document["steps"] if s["stage"] == "build"] == [("init-onnxruntime-int8", "ok")]
    steps = ("00-finetune", "01-prune", "02-qat")
    keys = {pipeline.plan(load_recipe(start, [f"model.weights={finished.folder / step}"]), device="cpu").steps[0].key for step in steps}
    assert len(keys) == len(steps)

    start.write_text(head.replace("resnet8", "resnet32") + "  - finetune\n  - qat\n  - export\n")
    said = [(p.line, p.message) for p in pipeline.validate(start)]
    assert [line for line, _ in said] == [2, 5, 6]
    assert "the network in model.weights has arch resnet8" in said[0][1]
    assert all("whose network is quantised: start from its float parent's folder" in message for _, message in said[1:])
    start.write_text(head.replace(str(finished.folder / "02-qat"), str(tmp_path)) + "  - export\n")
    (problem,) = pipeline.validate(start)
    assert problem.line == 2
    assert "model.json cannot be read" in problem.message
