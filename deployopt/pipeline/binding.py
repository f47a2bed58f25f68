"""A recipe's sections checked against the modules that they name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from deployopt import plugins
from deployopt.artifact import WEIGHTS, read_description
from deployopt.data import DataSource
from deployopt.errors import ArtifactError, Problem, RecipeError, UsageError
from deployopt.nn import ARCHITECTURES
from deployopt.recipe import DataSection, Document, Recipe, StageEntry, bind, json_schema, outline, parse, read_document
from deployopt.recipe.tree import Node, Place, compose
from deployopt.stages import Family, Stage, StageConfig
from deployopt.tasks import Task

QUANTIZING = frozenset({"qat", "ptq"})  # a stage that may follow neither works on float networks only


def validate(path: Path, overrides: Sequence[str] = ()) -> list[Problem]:
    """Every problem of a recipe: its YAML, its top level, and the options of each stage and of the data source."""
    try:
        document = read_document(path, overrides)
    except RecipeError as error:
        return list(error.problems)
    _, problems = parse(document)
    sections = outline(document)
    return problems + Binder(document).everything(sections.data, sections.stages, document.data)


def data_of(spec: str) -> tuple[DataSource, Any]:
    """The data source and its bound config. Raises UsageError, RecipeError."""
    name, _, options = spec.partition(":")
    source: DataSource = plugins.find("data", name)
    place = Place(f"--data {spec}")
    root, problems = Node({}, place), list[Problem]()
    for assignment in re.split(r",(?=[^,=\[\]]+=)", options) if options else []:  # a comma inside a value is not followed by KEY=
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--data: wanted NAME or NAME:KEY=VALUE,KEY=VALUE; found '{spec}'")
        value, faults = compose(text, place.source, located=False)
        root.put(key.strip(), value or Node(None, place))
        problems += faults
    document = Document(place.source, root)
    config, faults = bind(source.Config, document.data, (), document)
    if problems or faults:
        raise RecipeError([*problems, *faults])
    return source, config


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe, with the options of every stage, data source and task that is installed."""
    stages = {n: plugins.find("stages", n).Config for n in plugins.names("stages") if n != "init"}
    data = {n: plugins.find("data", n).Config for n in plugins.names("data")}
    return json_schema(stages=stages, data=data, tasks=plugins.names("tasks"))


def available() -> dict[str, list[str]]:
    """Every name a recipe can use, by kind, ours and installed third parties'."""
    return {
        "stages": [n for n in plugins.names("stages") if n != "init"],
        "backends": plugins.names("backends"),
        "datasets": plugins.names("data"),
        "models": [*ARCHITECTURES, *plugins.names("models")],
        "tasks": plugins.names("tasks"),
    }


@dataclass(frozen=True)
class Entry:
    stage_name: str
    name: str
    stage: Stage
    config: StageConfig
    at: tuple[str | int, ...] = ()  # path of its options in the document; the planned `init` has none


@dataclass(frozen=True)
class Bound:
    entries: tuple[Entry, ...]
    task: Task
    data: DataSource
    data_config: Any
    resolved: Mapping[str, Any]


class Binder:
    """Checks a recipe's sections against the modules that they name, gathering problems instead of stopping at the first."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self.problems: list[Problem] = []

    def everything(self, data: DataSection | None, stages: Sequence[StageEntry], recipe: Mapping[str, Any]) -> list[Problem]:
        """Problems of all sections that could be made out; `recipe` is the whole document."""
        task, model, budget = recipe.get("task"), recipe.get("model"), recipe.get("budget")
        entries = self.stages(stages)
        if isinstance(model, Mapping):
            self.start(model, entries)
        if isinstance(budget, Mapping):
            self.budget(entries, budget)
        if data is not None:
            self.data(data)
        if isinstance(task, str) and task not in plugins.names("tasks"):
            self.problems.append(self._document.problem(("task",), plugins.unknown("task", task, plugins.names("tasks"))))
        if isinstance(model, Mapping) and isinstance(model.get("arch"), str):
            self.architecture(model["arch"], model.get("stem"))
        return self.problems

    def find(self, kind: plugins.Kind, name: str, at: tuple[str | int, ...]) -> Any:
        """The module of that name, or None and a problem."""
        try:
            return plugins.find(kind, name)
        except UsageError as error:
            self.problems.append(self._document.problem(at, error.message))
            return None

    def architecture(self, name: str, stem: Any) -> None:
        known = [*ARCHITECTURES, *plugins.names("models")]
        if name not in known:
            self.problems.append(self._document.problem(("model", "arch"), plugins.unknown("architecture", name, known)))
        elif name not in ARCHITECTURES and stem is not None:
            self.problems.append(self._document.problem(("model", "stem"), f"is for our own architectures; '{name}' has its own first layers: leave it out"))

    def data(self, section: DataSection) -> tuple[DataSource, Any] | None:
        source = self.find("data", section.name, ("data", "name"))
        return None if source is None else (source, self._bind(source.Config, section.options, ("data",)))

    def stages(self, entries: Sequence[StageEntry]) -> list[Entry]:
        """Stages with their configs; those with problems are left out."""
        bound, seen = [], list[str]()
        for item in entries:
            if item.stage == "init":
                self.problems.append(self._document.problem(item.at, "'init' is planned by itself: leave it out", key=True))
                continue
            stage: Stage | None = self.find("stages", item.stage, item.at)
            if stage is None or not self._is_stage(item, stage):
                continue
            config = self._bind(stage.Config, item.options, item.at)
            self._check_order(item, stage, seen)
            seen.append(item.stage)
            if config is not None:
                bound.append(Entry(item.stage, item.name, stage, config, item.at))
        return bound

    def _is_stage(self, item: StageEntry, stage: Any) -> bool:
        missing = sorted(name for name in {*Stage.__annotations__, "expand", "run"} if not hasattr(stage, name))
        if missing:
            fault = f"'{item.stage}' is no stage: it lacks {', '.join(missing)}; `deployopt.stages.Stage` says what they mean"
            self.problems.append(self._document.problem(item.at, fault, key=True))
        return not missing

    def start(self, model: Mapping[str, Any], entries: Sequence[Entry]) -> Family:
        """Family of the network that the first stage is given; a folder of weights must fit the rest of the section, and the stages its lineage."""
        weights = model.get("weights")
        if not isinstance(weights, str) or not Path(weights).is_dir():
            return "float"
        try:
            description = read_description(Path(weights))
            if not (Path(weights) / WEIGHTS).is_file():
                raise ArtifactError(f"{weights} holds no {WEIGHTS}", "name the folder of a variant, as runs/…/01-prune")
        except ArtifactError as error:
            self.problems.append(self._document.problem(("model", "weights"), str(error)))
            return "float"
        for key in ("arch", "stem", "options"):
            wanted, found = model.get(key), description["base"].get(key)
            if wanted and wanted != found:
                self.problems.append(self._document.problem(("model", key), f"is {wanted}, and the network in model.weights has {key} {found}: set that"))
        if not any(entry["op"] == "quantize" for entry in description["lineage"]):
            return "float"
        for entry in entries:
            if entry.stage.not_after >= QUANTIZING:
                message = f"'{entry.stage_name}' cannot follow model.weights, whose network is quantised: start from its float parent's folder"
                self.problems.append(self._document.problem(entry.at, message, key=True))
        return "int8"

    def budget(self, entries: Sequence[Entry], limits: Mapping[str, Any]) -> None:
        """Refuse a limit on accuracy that nothing would be scored for: no row could ever meet it."""
        for entry in entries:
            if limits.get("max_accuracy_drop_pp") is not None and getattr(entry.config, "accuracy", True) is False:
                message = "false scores no artifact, so none can meet budget.max_accuracy_drop_pp: remove one of the two"
                self.problems.append(self._document.problem((*entry.at, "accuracy"), message))

    def _check_order(self, item: StageEntry, stage: Stage, seen: Sequence[str]) -> None:
        blocking = [name for name in seen if name in stage.not_after]
        if blocking:
            self.problems.append(self._document.problem(item.at, f"'{item.stage}' cannot come after '{blocking[0]}'; move it before", key=True))
        if stage.after and not stage.after & set(seen):
            wanted = "' or '".join(sorted(stage.after))
            self.problems.append(self._document.problem(item.at, f"'{item.stage}' needs '{wanted}' before it", key=True))

    def _bind(self, model: type[BaseModel], options: Mapping[str, Any], at: tuple[str | int, ...]) -> Any:
        config, problems = bind(model, options, at, self._document)
        self.problems += problems
        return config


def bind_recipe(recipe: Recipe) -> Bound:
    binder = Binder(recipe.document)
    entries = binder.stages(recipe.stages)
    family = binder.start(recipe.model.model_dump(), entries)
    binder.budget(entries, recipe.budget.model_dump())
    task = binder.find("tasks", recipe.task, ("task",))
    binder.architecture(recipe.model.arch, recipe.model.stem)
    data = binder.data(recipe.data)
    if binder.problems or data is None:
        raise RecipeError(binder.problems)
    init: Stage = plugins.find("stages", "init")
    start = Entry("init", "init", init, init.Config.model_validate({"fan_out": not entries[0].stage.from_scratch, "family": family}))
    return Bound((start, *entries), task, *data, _resolved(recipe, entries, data[1]))


def _resolved(recipe: Recipe, entries: Sequence[Entry], data_config: BaseModel) -> dict[str, Any]:
    resolved: dict[str, Any] = _without_folders(
        {
            **recipe.model_dump(mode="json", include={"name", "seed", "task", "model", "budget"}),
            "data": {"name": recipe.data.name, **data_config.model_dump(mode="json", by_alias=True)},
            "stages": [{e.stage_name: e.config.model_dump(mode="json", by_alias=True), "as": e.name} for e in entries],
        }
    )
    return resolved


def _without_folders(value: Any) -> Any:
    """Absolute paths cut down to their names: a report tells nothing of the machine's folders."""
    if isinstance(value, Mapping):
        return {name: _without_folders(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
