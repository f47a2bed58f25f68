"""What the recipes in recipes/ promise to a newcomer."""

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml"))
recipes = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def stages(path: Path) -> dict[str, Any]:
    return {name: options for stage in YAML(typ="safe").load(path)["stages"] for name, options in stage.items()}


@recipes
def test_the_header_says_how_to_start_it_what_it_needs_and_how_long_it_takes(path: Path) -> None:
    header = path.read_text().partition("\nname:")[0]
    assert f"# deployopt run recipes/{path.name}\n" in header
    assert re.search(r"^# Needs: \S", header, re.MULTILINE)
    time = re.search(r"^# Time: (.*(?:\n#  .*)*)", header, re.MULTILINE)
    assert time is not None
    assert re.search(r"\d (minute|hour|day)", time[1])
    assert re.search(r"\d CPU cores|GPU", time[1])
    assert re.search("measured|estimated", time[1])


@recipes
def test_engines_span_every_batch_size_that_is_measured(path: Path) -> None:
    from deployopt.stages.benchmark import Config as Benchmark
    from deployopt.stages.build import Config as Build

    found = stages(path)
    built, measured = Build(**found["build"]).batch_sizes, Benchmark(**found["benchmark"]).batch_sizes
    assert max(measured) <= max(built)


@pytest.mark.parametrize("path", [path for path in RECIPES if re.search("cifar10|imagefolder", path.stem)], ids=lambda path: path.stem)
def test_photographs_are_augmented_in_every_training(path: Path) -> None:
    found = stages(path)
    trainings = (found["finetune"], found["prune"]["finetune"], found["qat"])
    assert all(training["augment"]["horizontal_flip"] for training in trainings)
    assert all({"crop_padding", "resized_crop"} & training["augment"].keys() for training in trainings)
