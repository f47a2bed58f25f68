"""What contributors and containers are told of the house is so."""

import re
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


def test_the_edge_image_shows_a_folder_that_the_main_recipe_makes() -> None:
    shown = re.search(r"runs/RUN/([\w-]+)/", (ROOT / "docker" / "edge.Dockerfile").read_text())
    assert shown is not None
    assert shown[1] in {step.id for step in pipeline.plan(load_recipe(ROOT / "recipes" / "resnet18_int8.yaml")).steps}
