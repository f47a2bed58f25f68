"""Every way a recipe can be wrong ends in one RecipeError with positions; what is right round-trips."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field, ValidationError, model_validator

from deployopt.errors import Problem, RecipeError
from deployopt.recipe import Document, Recipe, Section, bind, json_schema, load_recipe, outline, parse, read_document

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted(ROOT.glob("recipes/*.yaml"))
DIGITS = (ROOT / "recipes/resnet18_int8.yaml").read_text()

SMALL = """\
name: small
model: {arch: resnet18}
data: {name: digits}
stages:
  - finetune: {epochs: 2, lr: 1e-3}
  - prune:
      target: {macs_ratio: 0.4}
  - finetune
    # nothing
  - qat:
  - export: {precisions: [fp32, int8]}
    as: onnx
"""


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def faults(path: Path, *overrides: str) -> list[Problem]:
    """What `load_recipe` refuses the file for."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return list(caught.value.problems)


def one_fault(path: Path, *overrides: str) -> Problem:
    found = faults(path, *overrides)
    assert len(found) == 1, found
    return found[0]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return written(tmp_path, SMALL)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipe_is_valid_and_says_how_to_run_it(path: Path) -> None:
    recipe = load_recipe(path)
    lines = path.read_text().splitlines()
    assert recipe.name == path.stem
    assert [s.stage for s in recipe.stages] == ["finetune", "prune", "qat", "export", "build", "benchmark"]
    assert lines[0] == "# yaml-language-server: $schema=./recipe.schema.json"
    assert f"# deployopt run recipes/{path.name}" in lines
    assert any(line.startswith("# Needs: ") for line in lines)


def test_the_five_recipes_are_shipped() -> None:
    assert [p.stem for p in SHIPPED] == [
        "resnet18_cifar10_int8",
        "resnet18_fashion_mnist_int8",
        "resnet18_int8",
        "resnet50_imagefolder_int8",
        "resnet56_cifar10_depgraph",
    ]


def test_recipe_holds_what_was_written(small: Path) -> None:
    recipe = load_recipe(small)
    assert (recipe.seed, recipe.task, recipe.model.stem, recipe.budget.min_speedup) == (0, "classification", None, None)
    assert [(s.stage, s.name) for s in recipe.stages] == [
        ("finetune", "finetune"),
        ("prune", "prune"),
        ("finetune", "finetune_2"),
        ("qat", "qat"),
        ("export", "onnx"),
    ]
    assert recipe.stages[0].options == {"epochs": 2, "lr": 0.001}
    assert recipe.stages[1].at == ("stages", 1, "prune")
    assert recipe.stages[2].options == recipe.stages[3].options == {}
    assert recipe.document.source == str(small)
    with pytest.raises(ValidationError):
        recipe.seed = 1  # type: ignore[misc]


def test_positions(small: Path) -> None:
    document = read_document(small)
    assert document.position(("model", "arch")) == (2, 15)
    assert document.position(("stages", 1, "prune", "target", "macs_ratio")) == (7, 28)
    assert document.position(("stages", 1, "prune", "target", "speedup", "x")) == document.position(("stages", 1, "prune", "target"))
    assert document.position(("stages", 2, "finetune", "lr")) == (8, 5)
    assert document.place(("stages", 4, "as"), key=True)[1:] == (12, 5)
    assert document.label(("stages", 2, "finetune", "lr")) == "stages.finetune_2.lr"
    assert document.label(("stages", 4, "export")) == "stages.onnx"


def test_sha256_is_of_the_values(tmp_path: Path) -> None:
    plain = read_document(written(tmp_path, SMALL)).sha256
    assert read_document(written(tmp_path, "# hello\n" + SMALL.replace("1e-3", "0.0010"))).sha256 == plain
    assert read_document(tmp_path / "recipe.yaml", ["seed=1"]).sha256 != plain


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), (".5", 0.5), ("5.", 5.0), ("-1", -1), ("0x1F", 31), ("0o17", 15), ("017", 17), ("1_000", "1_000"), ("yes", "yes"), ("on", "on"),
        ("True", True), ("false", False), ("~", None), ("Null", None), ('"1"', "1"), ("2026-11-21", "2026-11-21"), ("12:30", "12:30"), ("1.2.3", "1.2.3"),
        ('"\\ud83d\\ude00"', "😀"), ("nan", "nan"), ("[]", []), ("{a: [1, {b: 2}]}", {"a": [1, {"b": 2}]}), ("=", "="), ("<<", "<<"),
    ],
)  # fmt: skip
def test_core_schema(tmp_path: Path, text: str, value: object) -> None:
    found = read_document(written(tmp_path, f"x: {text}\n")).data["x"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("content", "position", "words"),
    [
        pytest.param("", (0, 0), "empty", id="empty"),
        pytest.param("# only a comment\n", (0, 0), "empty", id="comment"),
        pytest.param("- 1\n", (1, 1), "a recipe is a mapping (name, model, data, stages …), found a list", id="list"),
        pytest.param("hello\n", (1, 1), "found the text 'hello'", id="text"),
        pytest.param(b"name: x\nseed: \xff\n", (2, 1), "byte 0xff at offset 14", id="latin-1"),
        pytest.param("name: x".encode("utf-16"), (1, 1), "byte 0xff at offset 0", id="utf-16"),
        pytest.param("[" * 10_000, (1, 33), "nested more than 32 deep", id="nested list"),
        pytest.param("a: " + "{a: " * 10_000, (1, 125), "nested more than 32 deep", id="nested mapping"),
        pytest.param("".join(" " * i + "a:\n" for i in range(500)), (32, 32), "nested more than 32 deep", id="nested block"),
        pytest.param(b"a: " + b"x" * (1 << 20), (0, 0), "at most 1048576 bytes", id="large"),
        pytest.param("a: 1\n---\na: 2\n", (2, 1), "a second document begins here", id="documents"),
        pytest.param("%YAML 1.1\n---\na: yes\n", (2, 1), "recipes are YAML 1.2", id="yaml 1.1"),
        pytest.param("a: b\x07c\n", (1, 5), "the character U+0007 is not allowed", id="bell"),
        pytest.param('a: "\\UFFFFFFFF"\n', (1, 1), "an escape in the next text is no character", id="code point"),
        pytest.param("a:\n\tb: 1\n", (2, 1), "a tab cannot indent; use spaces", id="tab"),
        pytest.param("a: [1,\n2\n", (3, 1), "but got 'the end of the file' (while parsing a flow sequence that begins at line 1)", id="unclosed"),
    ],
)  # fmt: skip
def test_unreadable_yaml(tmp_path: Path, content: str | bytes, position: tuple[int, int], words: str) -> None:
    path = written(tmp_path, content)
    fault = one_fault(path)
    assert (fault.source, fault.line, fault.column) == (str(path), *position)
    assert words in fault.message


@pytest.mark.parametrize(
    ("content", "position", "words"),
    [
        pytest.param("a: 1\nb: 2\na: 3\n", (3, 1), "duplicate key 'a', first given at line 1, column 1", id="duplicate"),
        pytest.param("a: !!python/object/apply:os.system [ls]\n", (1, 4), "(found '!!python/object/apply:os.system')", id="python"),
        pytest.param("a: !mine 1\n", (1, 4), "'!mine'", id="own tag"),
        pytest.param("a: ! 1\n", (1, 4), "'!'", id="bare tag"),
        pytest.param("a: &x [1]\n", (1, 4), "anchors and aliases are not allowed in a recipe (found '&x')", id="anchor"),
        pytest.param('a: "\\0"\n', (1, 4), "control characters", id="escaped control"),
        pytest.param('a: "\\ud800"\n', (1, 4), "half of a surrogate pair", id="surrogate"),
        pytest.param("a: .nan\n", (1, 4), "a number must be finite, found .nan", id="nan"),
        pytest.param("a: -.inf\n", (1, 4), "a number must be finite", id="inf"),
        pytest.param("a: 1e999\n", (1, 4), "a number must be finite, found 1e999", id="overflow"),
        pytest.param(f"a: {'9' * 5000}\n", (1, 4), "whole numbers have at most 64 bits", id="long int"),
        pytest.param("1: a\n", (1, 1), "a key must be text, found 1", id="number key"),
        pytest.param("? [a]\n: b\n", (1, 3), "a key must be text, found a list", id="list key"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_read_is_one_fault_of_the_recipe(tmp_path: Path, content: str, position: tuple[int, int], words: str) -> None:
    path = written(tmp_path, content + "seed: -1\n")
    found = {(fault.line, fault.column): fault for fault in faults(path) if words in fault.message}
    assert list(found) == [position]
    assert any(fault.message == "seed: wants 0 or more, found -1" for fault in faults(path)), "the rest is checked too"


def test_an_unread_value_is_not_found_wrong_again(tmp_path: Path) -> None:
    content = SMALL.replace("name: small", "name: .nan").replace("lr: 1e-3", "lr: .inf").replace("resnet18", "&x resnet18").replace("digits", "*x")
    path = written(tmp_path, content)
    assert [(f.line, f.column) for f in faults(path)] == [(1, 7), (2, 15), (3, 14), (5, 31)]
    assert [f.message for f in faults(path, "seed=[.nan]", "stages.qta.lr=1")][:2] == [
        "a number must be finite, found .nan",
        "unknown stage 'qta'; did you mean 'qat'? (available: finetune_1, finetune_2, onnx, prune, qat)",
    ]


def test_faults_of_yaml_come_together(tmp_path: Path) -> None:
    path = written(tmp_path, "a: &x .nan\na: !t 1\nb: *x\n")
    assert sorted((f.line, f.column) for f in read_document(path).problems) == [(1, 4), (1, 4), (2, 1), (2, 4), (3, 4)]


def test_alias_bomb_is_refused_without_expanding(tmp_path: Path) -> None:
    layers = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    assert all("anchors and aliases" in f.message for f in read_document(written(tmp_path, "a: &a [lol]\n" + layers)).problems)


def test_files_that_cannot_be_read(small: Path) -> None:
    assert one_fault(small.with_name("recipy.yaml")).message == "no such file; did you mean 'recipe.yaml'? (in that folder: recipe.yaml)"
    assert one_fault(small.with_name("zzz")).message == "no such file (in that folder: recipe.yaml)"
    assert one_fault(small.parent).message == "this is a folder, not a recipe (in that folder: recipe.yaml)"
    assert "nor a folder" in one_fault(small.parent / "none" / "x.yaml").message
    assert "cannot be read" in one_fault(small / "below").message
    assert "cannot be read" in one_fault(Path("a\0b")).message
    assert "cannot be read" in one_fault(Path("x" * 5000)).message


def test_all_faults_of_the_top_level_come_at_once(tmp_path: Path) -> None:
    content = """\
name: a/b
seed: -1
modle: {}
model: {arch: resnet18, stem: smal, weights: 3}
data: {image_size: 32}
stages:
  - qat:
    lr: 0.1
  - export: 5
  - prune: {}
    as: 9
  - {}
budget: {min_speedup: 0, min_quantized_layers: 2, max_size_bytes: 1.5, max_latency: 3}
"""
    path = written(tmp_path, content)
    assert [str(f).removeprefix(f"{path}:") for f in faults(path)] == [
        "1:7: name: wants text that matches ^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$, found the text 'a/b'",
        "2:7: seed: wants 0 or more, found -1",
        "3:1: unknown key 'modle'; did you mean 'model'? (available: budget, data, model, name, seed, stages, task)",
        "4:31: model.stem: wants 'imagenet', 'small' or 'cifar', found the text 'smal'; did you mean 'small'?",
        "4:46: model.weights: wants text, found 3",
        "5:7: data: the key 'name' is missing",
        "7:5: stages.0: wants one stage such as `- export` or `- qat: {lr: 0.001}`, and perhaps `as: NAME`; "
        "found the keys qat, lr; are options indented below their stage?",
        "9:13: stages.export: wants a mapping of options, found 5",
        "11:9: stages.2: `as` wants a letter followed by up to 63 letters, digits, '_' or '-', found 9",
        "12:5: stages.3: wants one stage such as `- export` or `- qat: {lr: 0.001}`, and perhaps `as: NAME`; found an empty mapping",
        "13:23: budget.min_speedup: wants more than 0, found 0",
        "13:48: budget.min_quantized_layers: wants 1 or less, found 2",
        "13:67: budget.max_size_bytes: wants a whole number, found 1.5",
        "13:72: budget: unknown key 'max_latency'; did you mean 'max_latency_ms'? "
        "(available: max_accuracy_drop_pp, max_latency_ms, max_size_bytes, min_quantized_layers, min_speedup)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ("", "the key 'stages' is missing"),
        ("stages: []", "stages: wants a list of at least one stage, each after '- ', found an empty list"),
        ("stages: {qat: {}}", "stages: wants a list of at least one stage, each after '- ', found a mapping"),
        ("stages: [qat: {}, {prune: {}, as: qat}]", "stages.qat: another stage has the name 'qat' already; give one of them `as: NAME`"),
    ],
)
def test_stages(tmp_path: Path, stages: str, words: str) -> None:
    path = written(tmp_path, "name: a\nmodel: {arch: x}\ndata: {name: d}\n" + stages)
    assert one_fault(path).message == words


def test_parse_and_outline_keep_going(tmp_path: Path) -> None:
    document = read_document(written(tmp_path, SMALL.replace("name: small", "name: 3")))
    recipe, problems = parse(document)
    data, stages, none = outline(document)
    assert recipe is None
    assert len(problems) == 1
    assert none == []
    assert data is not None
    assert data.name == "digits"
    assert len(stages) == 5


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=7", ("seed",), 7),
        ("model.weights=a b.pth", ("model", "weights"), "a b.pth"),
        ("model.weights=", ("model", "weights"), None),
        ("model.options.width=2", ("model", "options", "width"), 2),
        ("stages.qat.lr=.5", ("stages", 3, "qat", "lr"), 0.5),
        ("stages.prune.target.macs_ratio=0.6", ("stages", 1, "prune", "target", "macs_ratio"), 0.6),
        ("stages.prune.target={speedup: 2}", ("stages", 1, "prune", "target"), {"speedup": 2}),
        ("stages.finetune_1.epochs=9", ("stages", 0, "finetune", "epochs"), 9),
        ("stages.finetune_2.epochs=9", ("stages", 2, "finetune", "epochs"), 9),
        ("stages.0.epochs=9", ("stages", 0, "finetune", "epochs"), 9),
        ("stages.onnx.precisions=[fp16, int8]", ("stages", 4, "export", "precisions"), ["fp16", "int8"]),
        ("stages.export.precisions.1=fp16", ("stages", 4, "export", "precisions"), ["fp32", "fp16"]),
        ("budget.min_speedup=2", ("budget", "min_speedup"), 2),
    ],
)
def test_override(small: Path, override: str, path: tuple[str | int, ...], value: object) -> None:
    document = read_document(small, [override])
    found: Any = document.data
    for step in path:
        found = found[step]
    assert found == value
    assert document.position(path) == (0, 0) or "precisions.1" in override
    assert document.source == str(small)


def test_overrides_apply_in_order(small: Path) -> None:
    recipe = load_recipe(small, ["stages=[export]", "stages.export.opset=21", "stages.export.opset=20", "budget={min_speedup: 2}", "budget.min_speedup=3"])
    assert [s.options for s in recipe.stages] == [{"opset": 20}]
    assert recipe.budget.min_speedup == 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "wanted KEY=VALUE"),
        ("=3", "wanted KEY=VALUE"),
        ("a..b=3", "wanted KEY=VALUE"),
        (".".join("a" * 40) + "=3", "wanted KEY=VALUE"),
        ("stages.qta.lr=1", "unknown stage 'qta'; did you mean 'qat'? (available: finetune_1, finetune_2, onnx, prune, qat)"),
        ("stages.finetune.lr=1", "'finetune' stands 2 times among the stages; say which: stages.finetune_1, stages.finetune_2"),
        ("stages.9.lr=1", "there is no stage 9; the recipe has 5, counted from 0"),
        ("stages.onnx.precisions.2=fp16", "'stages.onnx.precisions' is a list of 2 items, counted from 0; found '2'"),
        ("stages.onnx.precisions.last=fp16", "found 'last'"),
        ("name.first=x", "'name' is the text 'small' and has no key 'first'"),
        ("name.first.second=x", "'name' is the text 'small' and has no key 'first'"),
        ("name=[1", "not valid YAML"),
        ("name=!!str 1", "tags are not allowed"),
        ("name=*x", "anchors and aliases"),
        ("seed=.nan", "a number must be finite"),
        ("name=\udcff", "U+DCFF"),
        ("stages.qat=5", "stages.qat: wants a mapping of options, found 5"),
        ("seed=true", "seed: wants a whole number, found true"),
        ("budgt.min_speedup=2", "unknown key 'budgt'; did you mean 'budget'?"),
        ("data={}", "data: the key 'name' is missing"),
    ],
)
def test_override_that_cannot_be_meant(small: Path, override: str, words: str) -> None:
    fault = one_fault(small, override)
    assert fault.source.startswith("--set ")
    assert (fault.line, fault.column) == (0, 0)
    assert words in fault.message


class Ratio(Section):
    macs_ratio: float = Field(gt=0, lt=1)


class Speedup(Section):
    speedup: float = Field(gt=1)


class Schedule(Section):
    kind: Literal["step"]
    gamma: float


class Cosine(Section):
    kind: Literal["cosine"]


class Inner(Section):
    epochs: int = Field(default=1, ge=1, le=100)
    lr: float | None = None


class Tuned(Section):
    """Stands for a stage's Config."""

    target: Ratio | Speedup
    batch: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    sizes: tuple[Annotated[int, Field(ge=1)], ...] = (1,)
    least_one: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1,), min_length=1)
    mixed: int | list[int] | None = None
    nested: Inner | None = None
    everywhere: bool = Field(default=False, alias="global")
    schedule: Annotated[Schedule | Cosine, Field(discriminator="kind")] | None = None
    by_name: dict[str, Inner] = Field(default={})

    @model_validator(mode="after")
    def _agrees(self) -> "Tuned":
        if self.batch == 13:
            raise ValueError("batch must not be 13")
        return self


def bound(tmp_path: Path, options: str, *overrides: str) -> tuple[Tuned | None, list[str]]:
    document = read_document(written(tmp_path, f"stages:\n  - prune: {options}\n"), overrides)
    at = ("stages", 0, "prune")
    value, problems = bind(Tuned, document.data["stages"][0]["prune"], at, document)
    assert (value is None) == bool(problems)
    return value, [str(p).removeprefix(f"{document.source}:").replace("stages.prune", "@") for p in problems]


def test_bind_takes_what_yaml_can_say(tmp_path: Path) -> None:
    value, _ = bound(tmp_path, "{target: {macs_ratio: 0.5}, sizes: [1, 8], global: true, nested: {lr: 1}, schedule: {kind: step, gamma: 1}}")
    assert value is not None
    assert (value.sizes, value.everywhere, value.nested) == ((1, 8), True, Inner(lr=1.0))


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ("{target: {macs_ratio: 2}}", ["2:34: @.target.macs_ratio: wants less than 1, found 2"]),
        ("{target: {macs_rato: 2}}", ["2:22: @.target: unknown key 'macs_rato'; did you mean 'macs_ratio'? (available: macs_ratio, speedup)"]),
        ("{target: {}}", ["2:21: @.target: wants the keys of one of {macs_ratio} or {speedup}"]),
        ("{target: {macs_ratio: 0.5, speedup: 2}}", ["2:21: @.target: wants the keys of one of {macs_ratio} or {speedup}"]),
        ("{target: 3}", ["2:21: @.target: wants a mapping of keys to values, found 3"]),
        ("{}", ["2:12: @: the key 'target' is missing"]),
        ("{target: {speedup: 2}, batch: atuo}", ["2:42: @.batch: wants a whole number or 'auto', found the text 'atuo'; did you mean 'auto'?"]),
        ("{target: {speedup: 2}, batch: 0}", ["2:42: @.batch: wants more than 0, found 0"]),
        ("{target: {speedup: 2}, batch: 13}", ["2:12: @: batch must not be 13"]),
        ("{target: {speedup: 2}, mixed: [1, x]}", ["2:46: @.mixed.1: wants a whole number, found the text 'x'"]),
        ("{target: {speedup: 2}, mixed: x}", ["2:42: @.mixed: wants a whole number or a list, found the text 'x'"]),
        ("{target: {speedup: 2}, least_one: [0]}", ["2:47: @.least_one.0: wants 1 or more, found 0"]),
        ("{target: {speedup: 2}, least_one: []}", ["2:46: @.least_one: wants 1 or more items, found an empty list"]),
        ("{target: {speedup: 2}, sizes: [1, true, 0]}", ["2:46: @.sizes.1: wants a whole number, found true", "2:52: @.sizes.2: wants 1 or more, found 0"]),
        ("{target: {speedup: '2'}}", ["2:31: @.target.speedup: wants a number, found the text '2'"]),
        ("{target: {speedup: true}}", ["2:31: @.target.speedup: wants a number, found true"]),
        ("{target: {speedup: 2}, optimizer: adam}", ["2:46: @.optimizer: wants 'sgd' or 'adamw', found the text 'adam'; did you mean 'adamw'?"]),
        ("{target: {speedup: 2}, nested: {epochs: 0, lrr: 1}}",
         ["2:52: @.nested.epochs: wants 1 or more, found 0", "2:55: @.nested: unknown key 'lrr'; did you mean 'lr'? (available: epochs, lr)"]),
        ("{target: {speedup: 2}, by_name: {x: {epoch: 1}}}", ["2:49: @.by_name.x: unknown key 'epoch'; did you mean 'epochs'? (available: epochs, lr)"]),
        ("{target: {speedup: 2}, schedule: {kind: cos}}", ["2:45: @.schedule: wants 'kind' to be one of 'step', 'cosine', found a mapping"]),
        ("{target: {speedup: 2}, schedule: {kind: step, gama: 1}}",
         ["2:45: @.schedule: the key 'gamma' is missing", "2:58: @.schedule: unknown key 'gama'; did you mean 'gamma'? (available: gamma, kind)"]),
        ("{target: {speedup: 2}, everywhere: true}",
         ["2:35: @: unknown key 'everywhere' (available: batch, by_name, global, least_one, mixed, nested, optimizer, schedule, sizes, target)"]),
    ],
)  # fmt: skip
def test_bind_explains(tmp_path: Path, options: str, messages: list[str]) -> None:
    assert bound(tmp_path, options)[1] == messages


def test_unknown_option_of_an_override_names_the_override(tmp_path: Path) -> None:
    _, messages = bound(tmp_path, "{target: {speedup: 2}}", "stages.prune.optimzer=sgd")
    assert messages[0].startswith("--set @.optimzer=sgd: @: unknown key 'optimzer'; did you mean 'optimizer'?")


class Options(BaseModel):
    """Stands for a stage that takes anything."""


class Source(Section):
    """Stands for a data source's Config."""

    epochs: int = 1


def shipped_schema() -> dict[str, Any]:
    stages: dict[str, type[BaseModel]] = {s.stage: Options for path in SHIPPED for s in load_recipe(path).stages}
    sources: dict[str, type[BaseModel]] = {load_recipe(path).data.name: Options for path in SHIPPED}
    return json_schema({**stages, "tuned": Tuned, "inner": Inner}, {**sources, "strict": Source}, ["classification", "regression"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_schema_accepts_the_shipped_recipes(path: Path) -> None:
    schema = shipped_schema()
    Draft202012Validator.check_schema(schema)
    assert list(Draft202012Validator(schema).iter_errors(read_document(path).data)) == []


@pytest.mark.parametrize(
    ("overrides", "valid"),
    [
        (["stages=[inner, {inner: null}, {inner: {lr: 1}, as: x}, {tuned: {target: {speedup: 2}, global: true}}]"], True),
        (["data={name: strict, epochs: 3}", "task=regression"], True),
        (["stages=[tuned]"], False),
        (["stages=[{tuned: {target: {}}}]"], False),
        (["stages=[{inner: {lrr: 1}}]"], False),
        (["stages=[{inner: {}, as: 9}]"], False),
        (["stages=[{inner: {}, qat: {}}]"], False),
        (["stages=[]"], False),
        (["data={name: strict, epoch: 3}"], False),
        (["data={epochs: 3}"], False),
        (["data={name: nothing}"], False),
        (["task=detection"], False),
        (["model.stem=huge"], False),
        (["nmae=x"], False),
    ],
)
def test_schema_checks_options(overrides: list[str], valid: bool) -> None:
    data = read_document(ROOT / "recipes/resnet18_int8.yaml", overrides).data
    assert Draft202012Validator(shipped_schema()).is_valid(data) == valid


def test_schema_describes_fields_and_refers_only_to_what_it_holds() -> None:
    schema = shipped_schema()
    text = json.dumps(schema)
    assert schema["properties"]["seed"]["description"] == "Of initial weights, data order and augmentation."
    assert all(f'"#/$defs/{name}"' in text for name in schema["$defs"])
    assert "StageEntry" not in text


NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(st.characters(exclude_categories=["C"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abcxyz", min_size=1), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None)
@given(value=VALUES, ascii_only=st.booleans())
def test_override_round_trips_json(tmp_path_factory: pytest.TempPathFactory, value: object, ascii_only: bool) -> None:
    path = written(tmp_path_factory.getbasetemp(), SMALL)
    document = read_document(path, [f"stages.qat.value={json.dumps(value, ensure_ascii=ascii_only)}"])
    found = document.data["stages"][3]["qat"]["value"]
    assert json.dumps(found) == json.dumps(value)


def recipe_or_problems(path: Path, *overrides: str) -> Recipe | RecipeError:
    try:
        return load_recipe(path, overrides)
    except RecipeError as error:
        return error


def is_sound(outcome: Recipe | RecipeError) -> bool:
    """A recipe, or problems that can be printed."""
    return isinstance(outcome, Recipe) or (bool(outcome.problems) and all(p.message and str(p).encode() for p in outcome.problems))


YAML_LIKE = st.text(st.sampled_from("ab1 .:-[]{},\n\t\"'&*!|>%#?@~<=\\uU0xné\u2028\ufeff"), max_size=60)


@settings(deadline=None, max_examples=150)
@given(content=st.binary(max_size=80) | st.text(max_size=80).map(lambda t: t.encode("utf-8", "replace")) | YAML_LIKE.map(str.encode))
def test_arbitrary_files_raise_only_recipe_errors(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    outcome = recipe_or_problems(written(tmp_path_factory.getbasetemp(), content))
    assert isinstance(outcome, RecipeError)
    assert is_sound(outcome)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_damaged_recipes_raise_only_recipe_errors(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(DIGITS)))
    end = data.draw(st.integers(start, min(len(DIGITS), start + 20)))
    content = DIGITS[:start] + data.draw(YAML_LIKE) + DIGITS[end:]
    assert is_sound(recipe_or_problems(written(tmp_path_factory.getbasetemp(), content)))


STAGE_LIKE = st.tuples(st.sampled_from(["stages.qat", "stages", "stages.0", "stages.onnx.precisions", "model", "data", "budget", ""]), YAML_LIKE, YAML_LIKE)


@settings(deadline=None, max_examples=150)
@given(override=STAGE_LIKE.map(lambda t: f"{t[0]}.{t[1]}={t[2]}") | STAGE_LIKE.map(lambda t: f"{t[0]}={t[2]}") | st.text())
def test_arbitrary_overrides_raise_only_recipe_errors(tmp_path_factory: pytest.TempPathFactory, override: str) -> None:
    path = written(tmp_path_factory.getbasetemp(), SMALL)
    assert is_sound(recipe_or_problems(path, override))


def test_import_is_light() -> None:
    code = "import sys, deployopt.recipe; print(*sorted({'torch', 'numpy', 'onnx', 'ruamel.yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_document_is_not_printed_whole(small: Path) -> None:
    document = read_document(small)
    assert isinstance(document, Document)
    assert repr(document) == f"Document(source={str(small)!r})"
