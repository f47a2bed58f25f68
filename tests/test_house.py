"""What contributors and containers are told of the house is so."""

import ast
import re
import sys
import tomllib
from pathlib import Path

from deployopt import pipeline
from deployopt.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "deployopt"


def test_contributing_names_rooms_and_modules_that_exist() -> None:
    rows = re.findall(r"^\| (`.+?) \| (.+) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    rooms = {name.rstrip("/"): text for names, text in rows for name in re.findall(r"`([^`]+)`", names)}
    assert {"pipeline", "recipe", "store.py"} <= rooms.keys()
    assert [name for name in rooms if not (PACKAGE / name).exists()] == []
    for room in ("pipeline", "recipe"):
        modules = {path.stem for path in (PACKAGE / room).glob("[!_]*.py")}
        assert modules <= set(re.findall(r"`([^`]+)`", rooms[room])), room


def test_what_the_light_rooms_import_is_declared() -> None:
    """At a module's top, where nothing heavy is imported: the packages of the base installation, not what those happen to bring along."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[^\w.-]", line)[0].replace("-", "_").replace("ruamel.yaml", "ruamel") for line in declared}
    files = [file for room in ("bench", "report", "recipe", "pipeline") for file in (PACKAGE / room).glob("*.py")] + list(PACKAGE.glob("*.py"))
    statements = [(file.name, node) for file in files for node in ast.parse(file.read_text()).body]
    imported = {(name, alias.name) for name, node in statements if isinstance(node, ast.Import) for alias in node.names}
    imported |= {(name, str(node.module)) for name, node in statements if isinstance(node, ast.ImportFrom)}
    assert ("html.py", "markupsafe") in imported
    known = names | sys.stdlib_module_names | {"deployopt"}
    assert {(file, module) for file, module in imported if module.partition(".")[0] not in known} == set()


def test_the_edge_image_shows_a_folder_that_the_main_recipe_makes() -> None:
    shown = re.search(r"runs/RUN/([\w-]+)/", (ROOT / "docker" / "edge.Dockerfile").read_text())
    assert shown is not None
    assert shown[1] in {step.id for step in pipeline.plan(load_recipe(ROOT / "recipes" / "resnet18_int8.yaml")).steps}
