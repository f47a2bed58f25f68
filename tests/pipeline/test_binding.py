"""Options of backends: bound to their modules' models, and in the schema that editors check with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from deployopt import pipeline

RECIPE = "name: r\nmodel: {arch: resnet20}\ndata: {name: digits}\nstages:\n  - finetune\n  - export\n"
BACKENDS = "onnxruntime, openvino, tensorrt, tensorrt_rtx"


def build(options: str) -> str:
    return f"{RECIPE}  - build: {{backends: [{BACKENDS}], options: {{{options}}}}}\n"


@pytest.mark.parametrize(
    ("options", "at", "said"),
    [
        ("tensorrt: {optimization_level: 9}", "9", "tensorrt.optimization_level: wants 5 or less, found 9"),
        ("tensorrt: {optimzation_level: 3}", "optimz", "tensorrt: unknown key 'optimzation_level'; did you mean 'optimization_level'?"),
        ("tensorrt_rtx: {compute_capabilities: [86]}", "[86", "compute_capabilities: wants compute capabilities such as 8.6, found 86"),
        ("tensorrt_rtx: {compute_capabilities: [8.65]}", "[8.65", "compute_capabilities: wants compute capabilities such as 8.6, found 8.65"),
        ("onnxruntime: {providers: [rocm]}", "rocm", "onnxruntime.providers.0: wants 'cpu', 'cuda' or 'tensorrt', found the text 'rocm'"),
        ("onnxruntime: {providers: [cuda, cuda]}", "[cuda", "a provider is named twice: cuda, cuda"),
        ("openvino: {no_such_option: 4}", "no_such", "openvino: unknown key 'no_such_option' (available: "),
        ("openvino: 4", "4", "openvino: wants a mapping of keys to values, found 4"),
        ("tensort: {}", "tensort:", f"tensort: unknown backend 'tensort'; did you mean 'tensorrt'? (available: {BACKENDS})"),
    ],
)
def test_a_backends_option_is_refused_where_it_stands(tmp_path: Path, options: str, at: str, said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(build(options))
    (problem,) = pipeline.validate(path)
    assert said in problem.message.removeprefix("stages.build.options.")
    assert (problem.source, problem.line, problem.column) == (str(path), 7, build(options).splitlines()[6].rindex(at) + 1)


def test_options_of_a_backend_that_is_not_built_for_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(build("tensorrt: {optimization_level: 3}"))
    (problem,) = pipeline.validate(path, ["stages.build.backends=[openvino]"])
    assert problem.message == "stages.build.options.tensorrt: unknown backend 'tensorrt' (available: openvino)"


def test_the_schema_knows_each_backends_options(tmp_path: Path) -> None:
    schema = Draft202012Validator(pipeline.schema())

    def recipe(options: object) -> object:
        stages = ["finetune", "export", {"build": {"options": options}}]
        return {"name": "r", "model": {"arch": "resnet20"}, "data": {"name": "digits"}, "stages": stages}

    assert schema.is_valid(recipe({"tensorrt": {"optimization_level": 5}, "tensorrt_rtx": {"compute_capabilities": [8.6]}}))
    for wrong in ({"tensorrt": {"optimization_level": 9}}, {"tensorrt": {"optimzation_level": 3}}, {"openvino": {"no_such_option": 1}}, {"tensort": {}}):
        assert not schema.is_valid(recipe(wrong)), json.dumps(wrong)
