"""Recipes bound to this machine: what is planned, what is refused, and that neither needs the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runs import HURRIED, TINY

from deployopt import load_recipe, pipeline
from deployopt.errors import RecipeError


@pytest.mark.parametrize("name", sorted(p.name for p in (Path(__file__).parents[2] / "recipes").glob("*.yaml")))
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


def test_a_plan_is_made_without_the_data_or_their_package(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deployopt.data import digits
    from deployopt.errors import MissingDependency

    def absent(config: object) -> str:
        raise MissingDependency("sklearn", "train", "to load the digits")

    monkeypatch.setattr(digits, "fingerprint", absent)
    made = pipeline.plan(load_recipe(recipe))
    assert isinstance(made.data_problem, MissingDependency)
    assert not any(s.cached for s in made.steps)
    assert made.steps[1].why == f"not here: {made.data_problem.message}"


def test_a_plan_says_that_the_weights_are_missing(recipe: Path, tmp_path: Path) -> None:
    from io import StringIO

    from rich.console import Console

    from deployopt.errors import DataNotFound
    from deployopt.report import plan

    made = pipeline.plan(load_recipe(recipe, [f"model.weights={tmp_path / 'absent.pth'}"]), cache_home=tmp_path)
    assert isinstance(made.data_problem, DataNotFound)
    facts = {"data_problem": str(made.data_problem), "seconds": made.seconds, "device": "cpu", "threads": 1, "processes": 1}
    steps = [{"id": s.id, "cached": s.cached, "runs": s.runnable, "why": s.why, "seconds": s.seconds} for s in made.steps]
    shown = StringIO()
    plan.render({**facts, "steps": steps}, Console(file=shown, width=120))
    assert shown.getvalue().count("absent.pth does not exist\n  → model.weights is null, imagenet, the path of") == 1
    assert "time for what would run: unknown (what they need is not here)" in shown.getvalue()


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


@pytest.mark.parametrize(("written", "override"), [("{accuracy: false}", ()), ("{}", ("stages.benchmark.accuracy=false",))])
def test_an_accuracy_budget_without_scores_is_refused_where_it_stands(tmp_path: Path, written: str, override: tuple[str, ...]) -> None:
    path = tmp_path / "blind.yaml"
    path.write_text(TINY.replace(f"- benchmark: {json.dumps(HURRIED)}", f"- benchmark: {written}"))
    assert pipeline.validate(path, override) == []  # nothing to miss
    path.write_text(path.read_text() + "budget: {max_accuracy_drop_pp: 1.5}\n")
    (problem,) = pipeline.validate(path, override)
    assert "none can meet budget.max_accuracy_drop_pp: remove one of the two" in problem.message
    assert (problem.line, problem.column) == (10, 27) if not override else problem.source.startswith("--set")
    with pytest.raises(RecipeError, match=r"benchmark\.accuracy: false scores no artifact"):
        pipeline.plan(load_recipe(path, override))


def test_a_build_is_keyed_by_what_it_is_made_from_alone(recipe: Path, tmp_path: Path) -> None:
    def keys(*overrides: str) -> dict[str, str | None]:
        steps = pipeline.plan(load_recipe(recipe, overrides), device="cpu", threads=1, cache_home=tmp_path).steps
        return {s.id: s.key for s in steps if s.stage_name == "build" and ("-onnxruntime-" in s.id or "-tensorrt-" in s.id)}

    both = "stages.build.backends=[tensorrt, onnxruntime]"
    first = keys(both)
    assert len(first) == 2 * (3 + 3 + 1)  # two float variants in three precisions, one in INT8
    assert keys(both, "stages.build.timeout_minutes=5") == keys() == first  # other backends beside
    tuned = keys(both, "stages.build.options={tensorrt: {optimization_level: 5}}")
    assert {name for name in first if tuned[name] != first[name]} == {name for name in first if "-tensorrt-" in name}
    strict = keys(both, "stages.build.on_unverified=fail")
    assert all(strict[name] != first[name] for name in first)  # what runs in another precision than asked is dropped, whichever was
