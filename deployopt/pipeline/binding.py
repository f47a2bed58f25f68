"""A recipe's sections checked against the modules that they name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from deployopt import plugins
from deployopt.artifact import WEIGHTS, read_description
from deployopt.config import OptionsOf, Strict
from deployopt.data import DataSource
from deployopt.errors import ArtifactError, Problem, RecipeError, UsageError
from deployopt.nn import ARCHITECTURES, check_stem, check_weights
from deployopt.pipeline import crosschecks
from deployopt.pipeline.expansion import Entry, Fault, expand
from deployopt.recipe import DataSection, Document, Outline, Recipe, StageEntry, bind, json_schema, outline, parse, read_document
from deployopt.recipe.tree import KeyPath, Node, Place, compose
from deployopt.stages import Family, Stage
from deployopt.tasks import Task

QUANTIZING = frozenset({"qat", "ptq"})  # a stage that may follow neither works on float networks only


def validate(path: Path, overrides: Sequence[str] = ()) -> list[Problem]:
    """Every problem of a recipe: its YAML, its top level, and the options of each stage and of the data source."""
    try:
        document = read_document(path, overrides)
    except RecipeError as error:
        return list(error.problems)
    _, problems = parse(document)
    sections, binder = outline(document), Binder(document)
    binder.everything(sections, document.data)
    return problems + document.of_readable(binder.problems)


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
    kinds = {marker.kind for config in stages.values() for _, marker in options_of(config)}
    options = {kind: {n: module_options(kind, n) for n in plugins.names(kind)} for kind in kinds}
    return json_schema(stages=stages, data=data, tasks=plugins.names("tasks"), options=options)


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

    def everything(self, sections: Outline, recipe: Mapping[str, Any]) -> tuple[list[Entry], tuple[DataSource, Any] | None]:
        """The stages, `init` before them, and the data, after all sections were checked, each alone and against the others.

        Args:
            recipe: the document's values: sections may be missing or of the wrong kind.
        """
        model, budget = (value if isinstance(value := recipe.get(name), Mapping) else {} for name in ("model", "budget"))
        task = recipe.get("task", Recipe.model_fields["task"].default)
        entries = self.stages(sections.stages)
        entries = [self.start(model, entries), *entries] if entries else []
        sound = not sections.problems and not self.problems  # what follows from a faulty stage would be found faulty for it
        self.model(model)
        self.task(task, entries)
        if sound:
            steps, faults = expand(entries, here=False)
            self._refuse(faults)
            self._refuse(crosschecks.model(model, entries))
            self._refuse(crosschecks.budget(budget, entries, [] if faults else steps))
            self._refuse(crosschecks.cuda_graphs(entries, [] if faults else steps))
        return entries, None if sections.data is None else self.data(sections.data)

    def _refuse(self, faults: Iterable[Fault]) -> None:
        self.problems += [self._document.problem(fault.at, fault.message, key=fault.key) for fault in faults]

    def find(self, kind: plugins.Kind, name: str, at: KeyPath) -> Any:
        """The module of that name, or None and a problem."""
        try:
            return plugins.find(kind, name)
        except UsageError as error:
            self.problems.append(self._document.problem(at, error.message))
            return None

    def model(self, model: Mapping[str, Any]) -> None:
        """Check what the section says of the network, as far as it can be told without building it."""
        arch, stem, weights = (value if isinstance(value := model.get(name), str) else None for name in ("arch", "stem", "weights"))
        known = [*ARCHITECTURES, *plugins.names("models")]
        if arch is None:
            return
        if arch not in known:
            self.problems.append(self._document.problem(("model", "arch"), plugins.unknown("architecture", arch, known)))
            return
        if arch not in ARCHITECTURES and stem is not None:
            self.problems.append(self._document.problem(("model", "stem"), f"is for our own architectures; '{arch}' has its own first layers: leave it out"))
        self._check(("model", "stem"), check_stem, arch, stem)
        if weights is not None:
            self._check(("model", "weights"), check_weights, weights, arch, stem)

    def _check(self, at: KeyPath, check: Callable[..., None], *arguments: Any) -> None:
        try:
            check(*arguments)
        except UsageError as error:
            self.problems.append(self._document.problem(at, str(error)))

    def task(self, name: Any, entries: Sequence[Entry]) -> None:
        """Check the task, and the options that go with some tasks' losses only."""
        options = crosschecks.loss_options(entries)
        if isinstance(name, str) and name not in plugins.names("tasks"):
            self.problems.append(self._document.problem(("task",), plugins.unknown("task", name, plugins.names("tasks"))))
        elif isinstance(name, str) and options:
            self._refuse(crosschecks.losses(options, plugins.find("tasks", name).loss))

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
            if item.name == "init":
                self.problems.append(self._document.problem((*item.at[:2], "as"), "'init' is the name of the network that `model` describes: choose another"))
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

    def start(self, model: Mapping[str, Any], entries: Sequence[Entry]) -> Entry:
        """The planned `init` before these stages."""
        init: Stage = plugins.find("stages", "init")
        traced = any(getattr(entry.stage, "traces", False) for entry in entries)
        config = init.Config.model_validate({"fan_out": not entries[0].stage.from_scratch, "family": self._family(model, entries), "traced": traced})
        return Entry("init", "init", init, config)

    def _family(self, model: Mapping[str, Any], entries: Sequence[Entry]) -> Family:
        """Of the network that the first stage is given; a folder of weights must fit the rest of the section, and the stages its lineage."""
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

    def _check_order(self, item: StageEntry, stage: Stage, seen: Sequence[str]) -> None:
        blocking = [name for name in seen if name in stage.not_after]
        if blocking:
            self.problems.append(self._document.problem(item.at, f"'{item.stage}' cannot come after '{blocking[0]}'; move it before", key=True))
        if stage.after and not stage.after & set(seen):
            wanted = "' or '".join(sorted(stage.after))
            self.problems.append(self._document.problem(item.at, f"'{item.stage}' needs '{wanted}' before it", key=True))

    def _bind(self, model: type[BaseModel], options: Mapping[str, Any], at: KeyPath) -> Any:
        config, problems = bind(model, options, at, self._document)
        self.problems += problems
        for field, marker in options_of(model):
            given, allowed = options.get(field), getattr(config, marker.among, None)
            for name, inner in given.items() if isinstance(given, Mapping) else ():
                self._bind_module(marker.kind, name, inner, (*at, field, name), allowed)
        return config

    def _bind_module(self, kind: plugins.Kind, name: str, options: Any, at: KeyPath, allowed: Sequence[str] | None) -> None:
        """Check options of a single module; `allowed`: names that may have some, None if that could not be made out."""
        names = plugins.names(kind) if allowed is None else allowed
        if name not in names:
            self.problems.append(self._document.problem(at, plugins.unknown(kind.rstrip("s"), name, names), key=True))
        elif isinstance(options, Mapping):
            self._bind(module_options(kind, name), options, at)


def options_of(model: type[BaseModel]) -> list[tuple[str, OptionsOf]]:
    """Fields of a `Config` that hold other modules' options."""
    return [(name, marker) for name, info in model.model_fields.items() for marker in info.metadata if isinstance(marker, OptionsOf)]


def module_options(kind: plugins.Kind, name: str) -> type[BaseModel]:
    """A module's `Options`; one without has none."""
    found: type[BaseModel] = getattr(plugins.find(kind, name), "Options", NoOptions)
    return found


class NoOptions(Strict):
    """Of a module that has no options."""


def bind_recipe(recipe: Recipe) -> Bound:
    """Every section as its module's type.

    Raises:
        RecipeError: with every problem of every section.
    """
    binder = Binder(recipe.document)
    entries, data = binder.everything(Outline(recipe.data, recipe.stages, []), recipe.document.data)
    if binder.problems or data is None:
        raise RecipeError(binder.problems)
    return Bound(tuple(entries), plugins.find("tasks", recipe.task), *data, _resolved(recipe, entries[1:], data[1]))


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
