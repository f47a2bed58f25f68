"""JSON Schema of a whole recipe, for editors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from deployopt.config import OptionsOf
from deployopt.plugins import Kind
from deployopt.recipe.model import ALIAS_PATTERN, DataSection, Recipe, StageEntry


def json_schema(
    stages: Mapping[str, type[BaseModel]],
    data: Mapping[str, type[BaseModel]],
    tasks: Iterable[str],
    options: Mapping[Kind, Mapping[str, type[BaseModel]]] = MappingProxyType({}),
) -> dict[str, Any]:
    """JSON Schema 2020-12 of a whole recipe, for editors.

    Args:
        stages: each stage's `Config` by the stage's name.
        data: each data source's `Config` by its name.
        tasks: their names.
        options: by kind and name of the modules that a stage's field may hold options of (`config.OptionsOf`).
    """
    from pydantic.json_schema import models_json_schema

    models: list[type[BaseModel]] = list(dict.fromkeys([Recipe, StageEntry, DataSection, *stages.values(), *data.values()]))
    models += dict.fromkeys(m for named in options.values() for m in named.values())
    references, definitions = models_json_schema([(m, "validation") for m in models], ref_template="#/$defs/{model}")
    defs = definitions["$defs"]

    def name_of(m: type[BaseModel]) -> str:
        reference: str = references[m, "validation"]["$ref"]
        return reference.removeprefix("#/$defs/")

    for config in stages.values():
        for field, info in config.model_fields.items():
            for kind in (marker.kind for marker in info.metadata if isinstance(marker, OptionsOf)):
                named = {name: references[m, "validation"] for name, m in sorted(options[kind].items())}
                defs[name_of(config)]["properties"][info.alias or field] |= {"properties": named, "additionalProperties": False}
    recipe = deepcopy(defs[name_of(Recipe)])
    items = [item for name in sorted(stages) for item in _stage_schemas(name, references[stages[name], "validation"], defs[name_of(stages[name])])]
    recipe["properties"]["stages"] |= {"items": {"oneOf": items}}
    recipe["properties"]["data"] = {"oneOf": [_data_schema(name, defs[name_of(data[name])]) for name in sorted(data)]}
    recipe["properties"]["task"] |= {"enum": sorted(tasks)}
    replaced = {name_of(m) for m in (Recipe, StageEntry, DataSection)}
    inlined = set(map(name_of, data.values())) - set(map(name_of, stages.values()))
    kept = {name: schema for name, schema in sorted(defs.items()) if name not in replaced | inlined}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **recipe, "title": "deployopt recipe", "$defs": kept}


def _stage_schemas(name: str, reference: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """An item of `stages`: the single key with its options; where all have defaults also `null` or the bare name."""
    optional = not config.get("required")
    options = {"anyOf": [reference, {"type": "null"}]} if optional else reference
    alias = {"type": "string", "pattern": ALIAS_PATTERN, "description": "Name of this stage's variant."}
    yield {"type": "object", "properties": {name: options, "as": alias}, "required": [name], "additionalProperties": False}
    if optional:
        yield {"const": name}


def _data_schema(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    properties = {"name": {"const": name}, **config.get("properties", {})}
    return {**config, "title": name, "properties": properties, "required": ["name", *config.get("required", [])]}
