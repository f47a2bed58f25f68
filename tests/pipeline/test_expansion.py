"""Stages in a row ask for steps: none twice, and each refusal stands where its stage or option does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deployopt import load_recipe, pipeline
from deployopt.errors import RecipeError

HEAD = "name: r\nmodel: {arch: resnet20}\ndata: {name: digits}\nstages:\n  - finetune\n"


def refused(tmp_path: Path, *stages: str) -> list[str]:
    """Problems as LINE:COLUMN: MESSAGE; `validate` and `plan` say the same."""
    path = tmp_path / "r.yaml"
    path.write_text(HEAD + "".join(f"  - {stage}\n" for stage in stages))
    problems = pipeline.validate(path)
    if problems:
        with pytest.raises(RecipeError) as caught:
            pipeline.plan(load_recipe(path))
        assert list(caught.value.problems) == sorted(problems)
    return [str(p).removeprefix(f"{path}:") for p in sorted(problems)]


def test_what_is_built_twice_is_refused_at_the_second_build(tmp_path: Path) -> None:
    first, second = "build: {backends: [onnxruntime]}", "build: {backends: [onnxruntime, openvino]}"
    (problem,) = refused(tmp_path, "export: {precisions: [fp32]}", first, second, "benchmark")
    assert problem == "8:5: stages.build_2: makes finetune/onnxruntime/fp32 again, which 'build' makes already: leave each to one stage"
    assert refused(tmp_path, "export", first, "build: {backends: [openvino]}", "benchmark") == []


def test_what_is_exported_twice_is_refused_once_and_not_at_the_builds_that_follow(tmp_path: Path) -> None:
    (problem,) = refused(tmp_path, "export", "{export: {opset: 20}, as: older}", "build", "benchmark")
    assert problem == "7:6: stages.older: makes finetune/fp32, finetune/fp16, finetune/bf16 again, which 'export' makes already: leave each to one stage"
    assert refused(tmp_path, "export: {precisions: [fp32]}", "export: {precisions: [fp16]}", "build", "benchmark") == []


def test_the_name_of_the_first_network_is_taken(tmp_path: Path) -> None:
    (problem,) = refused(tmp_path, "{ptq: {}, as: init}", "export")
    assert problem == "6:19: stages.init: 'init' is the name of the network that `model` describes: choose another"


def test_an_option_that_earlier_stages_do_not_allow_is_refused_where_it_stands(tmp_path: Path) -> None:
    (problem,) = refused(tmp_path, "export: {precisions: [int8]}")
    assert problem.startswith("6:26: stages.export.precisions: int8 fits no variant (variants: finetune (float))")
    (problem,) = refused(tmp_path, "export", "build", "benchmark: {batch_sizes: [1, 16]}")
    assert problem.startswith("8:30: stages.benchmark.batch_sizes: wants batches of 16, and artifacts are built for up to 8")


def test_what_follows_from_a_faulty_stage_is_not_said(tmp_path: Path) -> None:
    (problem,) = refused(tmp_path, "qat: {epochs: 0}", "export: {precisions: [int8]}", "build", "benchmark: {batch_sizes: [16]}")
    assert problem.startswith("6:19: stages.qat.epochs")


def test_validating_asks_no_runtime_and_loads_no_numpy(repository: Path) -> None:
    """Also where latency is a target, and options depend on the task."""
    overrides = ["stages.prune.if_not_faster=warn", "stages.finetune.label_smoothing=0.1", "stages.qat.mixed_precision=auto"]
    code = (
        "import sys\nfrom pathlib import Path\nfrom deployopt import pipeline\n"
        f"print(pipeline.validate(Path('recipes/resnet18_int8.yaml'), {overrides!r}), *sorted({{'numpy', 'torch', 'onnxruntime'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
