"""Sections that are each right and do not go together: refused before anything runs, each with its place and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployopt import pipeline

RECIPE = """\
name: r
task: classification
model: {arch: resnet18, stem: small, weights: null}
data: {name: digits}
stages:
  - finetune: {epochs: 2}
  - prune: {target: {macs_ratio: 0.5}, finetune: {epochs: 1, warmup_epochs: 0}}
  - qat: {epochs: 1}
  - export: {precisions: [fp32, int8]}
  - build: {backends: [onnxruntime]}
  - benchmark
budget: {min_speedup: 2.0}
"""


def problems(tmp_path: Path, recipe: str, *overrides: str) -> list[str]:
    path = tmp_path / "r.yaml"
    path.write_text(recipe)
    return [str(p).removeprefix(f"{path}:") for p in pipeline.validate(path, overrides)]


def test_the_recipe_itself_is_right(tmp_path: Path) -> None:
    assert problems(tmp_path, RECIPE) == []


@pytest.mark.parametrize(
    ("found", "written", "said"),
    [
        ("weights: null", "weights: imagenet", "3:47: model.weights: ImageNet weights exist for resnet18, "),
        ("resnet18", "resnet20", "3:31: model.stem: resnet20 is a CIFAR ResNet and has the stem cifar only, found small\n  → remove model.stem"),
        ("weights: null", "weights: imagenett", "no file or folder 'imagenett' here; did you mean 'imagenet'?"),
        ("  - finetune: {epochs: 2}\n", "", "6:5: stages.prune: would work on random weights: give model.weights, or begin with a stage that trains"),
        ("  - benchmark\n", "", "11:1: budget: is never judged, since no stage measures: add the stage benchmark, or remove the budget"),
        ("[fp32, int8]", "[fp16, int8]", "12:23: budget.min_speedup: compares with the dense FP32 network, and 'finetune' is not built in it: add fp32"),
        ("min_speedup: 2.0", "min_quantized_layers: 1", None),
        ("[fp32, int8]", "[fp32]", None),
    ],
)
def test_sections_that_do_not_go_together(tmp_path: Path, found: str, written: str, said: str | None) -> None:
    assert found in RECIPE
    said_now = problems(tmp_path, RECIPE.replace(found, written))
    assert len(said_now) == (said is not None), said_now
    assert said is None or said in said_now[0]


def test_a_limit_on_int8_layers_needs_some(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, RECIPE.replace("[fp32, int8]", "[fp32]").replace("min_speedup: 2.0", "min_quantized_layers: 1"))
    assert problem.startswith("12:32: budget.min_quantized_layers: nothing is built in INT8: add a qat or ptq stage")


@pytest.mark.parametrize(
    ("mixed", "place", "drop"),
    [
        ("auto", "8:39: stages.qat.mixed_precision", "0.5"),
        ("{max_accuracy_drop_pp: 0.4}", "8:62: stages.qat.mixed_precision.max_accuracy_drop_pp", "0.4"),
        ("{backend: openvino}", "8:39: stages.qat.mixed_precision", "0.5"),
        ("{max_accuracy_drop_pp: 0.3}", None, None),
        ("[body.conv1]", None, None),
    ],
)
def test_mixed_precision_may_not_lose_more_than_the_budget(tmp_path: Path, mixed: str, place: str | None, drop: str | None) -> None:
    recipe = RECIPE.replace("qat: {epochs: 1}", f"qat: {{epochs: 1, mixed_precision: {mixed}}}")
    assert problems(tmp_path, recipe) == []
    found = problems(tmp_path, recipe.replace("min_speedup: 2.0", "max_accuracy_drop_pp: 0.3"))
    said = f": accepts a drop of {drop}, and budget.max_accuracy_drop_pp allows 0.3: set mixed_precision: {{max_accuracy_drop_pp: 0.3}}, or raise the budget"
    assert found == ([] if place is None else [place + said])


def test_cuda_graphs_are_of_tensorrts_engines(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, RECIPE.replace("- benchmark", "- benchmark: {cuda_graph: true}"))
    assert problem.startswith(
        "11:29: stages.benchmark.cuda_graph: true launches engines of tensorrt as CUDA graphs, and none is built: add it to build.backends"
    )
    assert problems(tmp_path, RECIPE.replace("[onnxruntime]", "[onnxruntime, tensorrt]"), "stages.benchmark.cuda_graph=true") == []


def test_weights_that_are_a_path_may_lie_elsewhere(tmp_path: Path) -> None:
    for weights in ("runs/x/01-prune", "resnet18.pth"):
        assert problems(tmp_path, RECIPE.replace("weights: null", f"weights: {weights}")) == []


@pytest.mark.parametrize(
    ("option", "place"),
    [
        ("stages.finetune.label_smoothing=0.1", "stages.finetune.label_smoothing"),
        ("stages.prune.finetune.label_smoothing=0.1", "stages.prune.finetune.label_smoothing"),
        ("stages.qat.distill.temperature=2.0", "stages.qat.distill.temperature"),
        ("stages.finetune.label_smoothing=0.0", None),  # off
        ("stages.qat.distill.weight=0.5", None),
    ],
)
def test_options_of_another_loss_than_the_tasks(tmp_path: Path, option: str, place: str | None) -> None:
    assert problems(tmp_path, RECIPE, option) == []
    found = problems(tmp_path, RECIPE, option, "task=regression")
    if place is None:
        assert found == []
    else:
        assert found == [f"--set {option}: {place}: is an option of cross_entropy, and the loss of this task is smooth_l1: remove it"]
