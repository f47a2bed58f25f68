"""The package that docs/extending.md builds, installed as a third party's is and run as a user runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "extending.md"
HERE = ("--device", "cpu", "--threads", "1")


def overrides(*assignments: str) -> list[str]:
    return [part for assignment in assignments for part in ("--set", assignment)]


DATA = overrides("data.held_out=0.3", "model.options.width=8", "stages.ptq.calibration_images=64")
TINY = DATA + overrides(
    "stages.finetune.epochs=1",
    "stages.finetune.warmup_epochs=0",
    "stages.prune.if_not_faster=ignore",
    "stages.calibrate_bn.images=128",
    "stages.export.precisions=[int8]",
    "stages.benchmark.min_seconds=0.1",
    "stages.benchmark.profile=false",
    "stages.benchmark.max_spread=100",  # other tests run beside this one: what is tested is that it measures, not how fast it is
    "stages.benchmark.max_contention=100",
    "stages.benchmark.max_drift=100",
    "stages.benchmark.max_pressure=100",
    "stages.benchmark.max_steal_percent=100",
    "stages.benchmark.max_clock_drop=100",
)
AGAIN = overrides("data.held_out=0.3", "stages.prune.if_not_faster=ignore", "stages.ptq.calibration_images=64", "stages.export.precisions=[int8]")


def blocks(document: Path, language: str) -> list[str]:
    """Contents of the fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Home:
    """A folder with the documented files, and with the package as if pip had installed it there."""

    folder: Path

    def deployopt(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.python("-m", "deployopt", *arguments)

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(self.folder), str(ROOT)]), "XDG_CACHE_HOME": str(self.folder / "cache")}
        return subprocess.run([sys.executable, *arguments], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300, check=False)

    def run(self, recipe: str, run_dir: str, *more: str) -> dict[str, Any]:
        done = self.deployopt("run", recipe, "--run-dir", run_dir, "--json", *HERE, *more)
        assert done.returncode == 0, done.stderr
        report: dict[str, Any] = json.loads(done.stdout)
        return report


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("home")
    for text in [block for language in ("python", "yaml", "toml") for block in blocks(PAGE, language)]:
        path = folder / text.partition("\n")[0].removeprefix("# ")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    (info / "entry_points.txt").write_text("".join(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups))
    made = Home(folder)
    assert made.python("make_gauges.py").returncode == 0
    return made


@pytest.fixture(scope="module")
def report(home: Home) -> dict[str, Any]:
    return home.run("gauges.yaml", "gauges", *TINY)


@pytest.mark.slow
def test_the_recipe_makes_the_documented_variants(report: dict[str, Any]) -> None:
    variants = {v["name"]: v for v in report["variants"]}
    assert list(variants) == ["finetune", "prune", "calibrate_bn", "ptq"]
    assert variants["calibrate_bn"]["parent"] == "prune"
    assert variants["calibrate_bn"]["record"]["calibrated_on"] == 128
    assert variants["calibrate_bn"]["params"] == variants["prune"]["params"] < variants["finetune"]["params"]
    assert variants["ptq"]["parent"] == "calibrate_bn"
    assert report["task"] == {"name": "ordinal", "primary": "levels_off", "unit": "levels", "higher_is_better": False}
    assert report["classes"] == ["empty", "low", "half", "full"]


@pytest.mark.slow
def test_the_backend_is_measured_and_agrees_with_onnx_runtime(report: dict[str, Any]) -> None:
    rows = {(r["variant"], r["backend"], r["precision"]): r for r in report["rows"] if r["backend"] != "torch"}
    assert set(rows) == {("ptq", "onnxruntime", "int8"), ("ptq", "reference", "int8")}
    mine = rows["ptq", "reference", "int8"]
    assert mine["status"] == "ok", mine["reason"]
    assert mine["provider"] == "onnx.reference"
    assert mine["latency_ms"]["host"]["p50"] > 0
    assert mine["accuracy"]["primary"] == "levels_off"
    assert mine["accuracy"]["n"] == 144
    assert mine["accuracy"]["torch_agreement"] >= 0.97
    assert mine["accuracy"]["levels_off"] == pytest.approx(rows["ptq", "onnxruntime", "int8"]["accuracy"]["levels_off"], abs=0.1)


@pytest.mark.slow
def test_a_network_measured_anew_is_another_network(home: Home, report: dict[str, Any]) -> None:
    from safetensors.numpy import load_file

    before, after = (load_file(home.folder / "gauges" / step / "model.safetensors") for step in ("01-prune", "02-calibrate_bn"))
    changed = {name.rpartition(".")[2] for name in before if (before[name] != after[name]).any()}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.slow
def test_a_finished_checkpoint_is_quantised_without_training(home: Home, report: dict[str, Any]) -> None:
    shutil.copyfile(home.folder / "gauges" / "00-finetune" / "model.safetensors", home.folder / "narrow.safetensors")
    again = home.run("from_checkpoint.yaml", "from_checkpoint", "--until", "build", *DATA)
    variants = {v["name"]: v for v in again["variants"]}
    assert list(variants) == ["init", "ptq"]
    trained = next(v for v in report["variants"] if v["name"] == "finetune")
    assert variants["init"]["accuracy"] == trained["accuracy"]
    built = {step["label"]: step["status"] for step in again["steps"] if step["stage"] == "build"}
    assert built == {"init-onnxruntime-fp32": "ok", "ptq-onnxruntime-int8": "ok"}


@pytest.mark.slow
def test_a_pruned_variant_is_pruned_again(home: Home, report: dict[str, Any]) -> None:
    again = home.run("pruned_again.yaml", "pruned_again", "--until", "build", *AGAIN)
    variants = {v["name"]: v for v in again["variants"]}
    once = next(v for v in report["variants"] if v["name"] == "prune")
    assert variants["init"]["params"] == once["params"]
    assert variants["init"]["accuracy"] == once["accuracy"]
    assert variants["prune"]["macs"] <= 0.7 * once["macs"]
    lineage = json.loads((home.folder / "pruned_again" / "01-ptq" / "model.json").read_text())["lineage"]
    assert [entry["op"] for entry in lineage] == ["prune", "prune", "quantize"]


def test_list_doctor_and_schema_know_the_package(home: Home) -> None:
    names = json.loads(home.deployopt("list", "--json").stdout)
    added = {"datasets": "npz", "models": "narrow", "tasks": "ordinal", "stages": "calibrate_bn", "backends": "reference"}
    assert {kind: name for kind, name in added.items() if name in names[kind]} == added
    assert json.loads(home.deployopt("doctor", "--json").stdout)["backends"]["reference"]["runs"] is True
    schema = home.deployopt("schema").stdout
    assert "Training images to measure on, rounded down to whole batches of 32" in schema
    assert "Names of the classes 0, 1, 2 …" in schema


def test_a_misspelt_option_is_answered_with_its_place(home: Home) -> None:
    text = (home.folder / "gauges.yaml").read_text().replace("- calibrate_bn", "- calibrate_bn: {image: 256}")
    (home.folder / "typo.yaml").write_text(text)
    line = next(n for n, content in enumerate(text.splitlines(), start=1) if "calibrate_bn" in content)
    for command in ("validate", "run"):
        done = home.deployopt(command, "typo.yaml")
        assert done.returncode == 2
        assert re.search(rf"typo\.yaml:{line}:20: .*unknown key 'image'; did you mean 'images'\?", done.stderr), done.stderr


def test_missing_data_name_the_command_that_makes_them(home: Home) -> None:
    done = home.deployopt("run", "gauges.yaml", "--set", "data.file=nowhere.npz")
    assert done.returncode == 3
    assert "python make_gauges.py" in done.stderr


@pytest.mark.slow
def test_a_new_version_of_the_package_is_another_network(home: Home, report: dict[str, Any]) -> None:
    info = home.folder / "my_package-1.0.dist-info" / "METADATA"
    plan = ("plan", "gauges.yaml", "--json", *HERE, *TINY)
    before = {s["id"]: s["cached"] for s in json.loads(home.deployopt(*plan).stdout)["steps"]}
    info.write_text(info.read_text().replace("1.0", "1.1"))
    try:
        after = {s["id"]: s["cached"] for s in json.loads(home.deployopt(*plan).stdout)["steps"]}
    finally:
        info.write_text(info.read_text().replace("1.1", "1.0"))
    assert before["00-finetune"] is True
    assert after["00-finetune"] is False


@pytest.mark.parametrize("document", ["docs/extending.md", "README.md"])
def test_recipes_shown_in_documents_are_valid(home: Home, document: str) -> None:
    recipes = [text for text in blocks(ROOT / document, "ya?ml") if "stages:" in text]
    assert len(recipes) == len(re.findall(r"^\s*stages:", (ROOT / document).read_text(), re.MULTILINE))  # none stands outside a yaml block
    if not recipes:
        pytest.skip(f"{document} shows no recipe")
    for number, text in enumerate(recipes):
        (home.folder / f"shown-{number}.yaml").write_text(text)
    done = home.deployopt("validate", *[f"shown-{number}.yaml" for number in range(len(recipes))])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": ok") == len(recipes)
