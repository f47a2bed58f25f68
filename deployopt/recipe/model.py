"""The strict top level of a recipe. The options of stages and of the data source are checked by the planner, with `bind`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, JsonValue, PrivateAttr

from deployopt.config import Strict
from deployopt.errors import Problem, RecipeError
from deployopt.recipe.binding import bind
from deployopt.recipe.document import Document, read_document, stage_of
from deployopt.recipe.words import found_words, short

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
ALIAS_PATTERN = r"^[A-Za-z][A-Za-z0-9_-]{0,63}$"  # no dot and no leading digit: `--set stages.NAME.lr` must find it


class Section(Strict):
    """Base of a recipe's own sections: frozen, unknown keys and NaN refused."""


class ModelConfig(Section):
    """The network that the first stage starts from."""

    arch: str = Field(pattern=NAME_PATTERN)
    """Name of the network: torchvision's ResNets, or your own through the entry point `deployopt.models`; see `deployopt list models`."""
    weights: str | None = None
    """null starts at random; "imagenet" takes torchvision's default weights (downloaded); else the path of a .safetensors or .pth state dict, or the
    folder of a variant that an earlier run made (runs/…/01-prune): then what was pruned stays pruned, and what was quantised, quantised."""
    stem: Literal["imagenet", "small", "cifar"] | None = None
    """First layers: null is the network's own (imagenet for torchvision's ResNets, cifar for the CIFAR ones); imagenet is 7×7 stride 2
    and max-pool; small 3×3 stride 2 without max-pool; cifar 3×3 stride 1 without max-pool."""
    options: dict[str, JsonValue] = Field(default={})
    """Keyword arguments of your own network."""


class Budget(Section):
    """What the recommended artifact must meet; a miss is exit code 1."""

    max_accuracy_drop_pp: float | None = Field(default=None, ge=0)
    """Largest loss of the headline accuracy against the dense FP32 model, in percentage points."""
    min_speedup: float | None = Field(default=None, gt=0)
    """Smallest speed-up over the dense FP32 row of the same backend and batch."""
    max_latency_ms: float | None = Field(default=None, gt=0)
    """Largest median latency in milliseconds."""
    max_size_bytes: int | None = Field(default=None, gt=0)
    """Largest size of the artifact's file in bytes."""
    min_quantized_layers: float | None = Field(default=None, gt=0, le=1)
    """Smallest share (0–1) of the quantizable layers, but those that mixed_precision keeps in float, that each INT8 artifact really runs in INT8. One whose
    runtime does not tell misses it."""


class StageEntry(Section):
    """One stage of the recipe, its options not yet checked."""

    stage: str
    """Name of the stage's module."""
    name: str
    """`as:` or the stage's name; the second without `as` is finetune_2."""
    options: dict[str, JsonValue] = Field(default={})
    """As written."""
    at: tuple[str | int, ...]
    """Path of the options in the document."""


class DataSection(Section):
    """The data source, its options not yet checked."""

    name: str
    """Name of the data source; see `deployopt list datasets`."""
    options: dict[str, JsonValue] = Field(default={})
    """The section without `name`."""


class Recipe(Section):
    """Everything a run depends on."""

    name: str = Field(pattern=NAME_PATTERN)
    """Names the run folder: letters, digits, '.', '_' and '-'."""
    seed: int = Field(default=0, ge=0)
    """Of initial weights, data order and augmentation."""
    task: str = "classification"
    """What the head's outputs mean and how they are scored."""
    model: ModelConfig
    data: DataSection
    stages: tuple[StageEntry, ...] = Field(min_length=1)
    """In the order they run."""
    budget: Budget = Budget()
    _document: Document = PrivateAttr()

    @property
    def document(self) -> Document:
        """Where the recipe's values were written."""
        return self._document

    @property
    def weights_path(self) -> Path | None:
        """The local file or folder of weights, if the recipe names one; relative to the working directory, as every path in a recipe."""
        weights = self.model.weights
        return None if weights in (None, "imagenet") else Path(weights)


class Outline(NamedTuple):
    """The parts of a recipe that others check further, as far as they can be made out."""

    data: DataSection | None
    stages: tuple[StageEntry, ...]
    problems: list[Problem]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check its top level; the planner checks each stage's and the data source's options.

    Raises:
        RecipeError: with every problem found.
    """
    recipe, problems = parse(read_document(path, overrides))
    if recipe is None:
        raise RecipeError(problems)
    return recipe


def parse(document: Document) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, or None and every problem of its values and its top level."""
    _, stages, problems = outline(document)
    values = dict(document.data)
    # faults of `stages` are found by `outline`; an entry stands in for stages that could not be read
    values["stages"] = [entry.model_dump() for entry in stages] or [{"stage": "", "name": "", "at": []}]
    if isinstance(values.get("data"), dict):
        values["data"] = _split_data(values["data"])
    recipe, more = bind(Recipe, values, (), document)
    if recipe is None or problems or document.problems:
        return None, [*document.problems, *document.of_readable(problems + more)]
    recipe._document = document
    return recipe, []


def outline(document: Document) -> Outline:
    """Data source and stages of a recipe, also of one with faults elsewhere, so that these can be checked too."""
    section = document.data.get("data")
    data, _ = bind(DataSection, _split_data(section), ("data",), document) if isinstance(section, dict) else (None, [])
    stages = document.data.get("stages")
    if "stages" not in document.data:
        return Outline(data, (), [document.problem((), "the key 'stages' is missing")])
    if not isinstance(stages, list) or not stages:
        return Outline(data, (), [document.problem(("stages",), f"wants a list of at least one stage, each after '- ', found {found_words(stages)}")])
    entries: list[StageEntry] = []
    problems: list[Problem] = []
    counts: Counter[str] = Counter()
    for index, item in enumerate(stages):
        stage, alias = stage_of(item)
        faults = list(_stage_faults(document, index, item, stage))
        problems += faults
        if stage is None or faults:
            continue
        counts[stage] += alias is None
        name = alias or (stage if counts[stage] == 1 else f"{stage}_{counts[stage]}")
        if name in (entry.name for entry in entries):
            problems.append(document.problem(("stages", index, "as"), f"another stage has the name '{name}' already; give one of them `as: NAME`"))
        options = item[stage] if isinstance(item, dict) else None
        entries.append(StageEntry(stage=stage, name=name, options=options or {}, at=("stages", index, stage)))
    return Outline(data, tuple(entries), problems)


def _stage_faults(document: Document, index: int, item: Any, stage: str | None) -> Iterator[Problem]:
    at = ("stages", index)
    if stage is None:
        found = (
            f"the keys {', '.join(short(key) for key in item)}; are options indented below their stage?"
            if isinstance(item, dict) and item
            else found_words(item)
        )
        yield document.place(at).problem(f"stages.{index}: wants one stage such as `- export` or `- qat: {{lr: 0.001}}`, and perhaps `as: NAME`; found {found}")
    elif isinstance(item, dict):
        if item[stage] is not None and not isinstance(item[stage], dict):
            yield document.problem((*at, stage), f"wants a mapping of options, found {found_words(item[stage])}")
        alias = item.get("as", "unnamed")
        if not isinstance(alias, str) or not re.fullmatch(ALIAS_PATTERN[1:-1], alias):
            yield document.place((*at, "as")).problem(
                f"stages.{index}: `as` wants a letter followed by up to 63 letters, digits, '_' or '-', found {found_words(alias)}"
            )


def _split_data(section: Mapping[str, Any]) -> dict[str, Any]:
    name = {"name": section["name"]} if "name" in section else {}
    return {**name, "options": {key: value for key, value in section.items() if key != "name"}}
