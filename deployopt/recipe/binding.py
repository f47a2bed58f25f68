"""Values from a document into a pydantic model, each fault as a sentence with its place."""

from __future__ import annotations

import json
import re
import types
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from deployopt.errors import Problem
from deployopt.plugins import did_you_mean, unknown
from deployopt.recipe.document import Document
from deployopt.recipe.tree import KeyPath
from deployopt.recipe.words import found_words, short

Model = TypeVar("Model", bound=BaseModel)


def bind(model: type[Model], values: Mapping[str, Any], at: KeyPath, document: Document) -> tuple[Model | None, list[Problem]]:
    """`values`, which stand at `at` in the document, as a `model`, or None and one problem for each fault."""
    try:
        # through JSON, strict models take a list for a tuple and text for an enum or a path, and still refuse "1" for 1
        return model.model_validate_json(json.dumps(dict(values))), []
    except ValidationError as error:
        faults = [_Fault.of(details, values) for details in error.errors(include_url=False)]
    return None, [_explain(fault, model, at, document) for fault in _settle(faults)]


class _Fault(NamedTuple):
    """One of pydantic's errors.

    Attributes:
        path: in the values. found: the value there.
        members: of the unions on the way, each with its depth in `path`, outermost first.
        wants: what would be right, as a noun phrase; "" if `text` says it all.
        text: pydantic's (or the validator's) sentence. member: of the innermost union, where the value was taken for one.
    """

    kind: str
    path: KeyPath
    found: Any
    members: tuple[tuple[int, str], ...]
    wants: str
    text: str
    member: str | None = None

    @staticmethod
    def of(details: Any, values: Mapping[str, Any]) -> _Fault:
        kind = details["type"]
        context = {key: int(value) if isinstance(value, float) and value.is_integer() else value for key, value in details.get("ctx", {}).items()}
        path: list[str | int] = []
        members: list[tuple[int, str]] = []
        here: Any = values
        for depth, step in enumerate(details["loc"], start=1):
            if (isinstance(here, Mapping) and step in here) or (isinstance(here, list) and isinstance(step, int) and step < len(here)):
                path.append(step)
                here = here[step]
            elif kind == "missing" and depth == len(details["loc"]):
                path.append(step)
            else:
                members.append((len(path), str(step)))
        text = str(context["error"]) if kind in ("value_error", "assertion_error") else details["msg"]
        wants = _WANTS[kind].format(**context) if kind in _WANTS else text.removeprefix("Input should be ") if text.startswith("Input should be ") else ""
        return _Fault(kind, tuple(path), details["input"], tuple(members), wants, text)


_WANTS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "none_required": "null",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "multiple_of": "a multiple of {multiple_of}",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_short": "text of {min_length} or more characters",
    "string_too_long": "text of {max_length} or fewer characters",
    "too_short": "{min_length} or more items",
    "too_long": "{max_length} or fewer items",
    "union_tag_invalid": "{discriminator} to be one of {expected_tags}",
    "union_tag_not_found": "the key {discriminator}",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping of keys to values",
    "mapping_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "dataclass_type": "a mapping of keys to values",
}


def _settle(faults: Sequence[_Fault]) -> list[_Fault]:
    """Of the members of each union keep the faults of the one that was probably meant; where that is open, say what all want."""
    settled = [fault for fault in faults if not fault.members and not (fault.kind == "too_short" and _has_faulty_items(fault, faults))]
    unions: defaultdict[KeyPath, defaultdict[str, list[_Fault]]] = defaultdict(lambda: defaultdict(list))
    for fault in faults:
        if fault.members:
            (depth, member), *inner = fault.members
            unions[fault.path[:depth]][member].append(fault._replace(members=tuple(inner), member=member))
    for site, members in unions.items():
        settled += _choose(site, [_settle(of_one) for of_one in members.values()])
    return settled


def _has_faulty_items(fault: _Fault, faults: Sequence[_Fault]) -> bool:
    """Whether a list is too short only because pydantic does not count items that are faulty themselves."""
    return any(other.path[: len(fault.path)] == fault.path and len(other.path) > len(fault.path) for other in faults)


def _choose(site: KeyPath, members: list[list[_Fault]]) -> list[_Fault]:
    fitting = [m for m in members if not any(f.path == site and _is_wrong_kind(f) for f in m)] or members
    best = [m for m in fitting if len(m) == min(map(len, fitting))]
    if len(best) == 1:
        return best[0]
    if all(len(m) == 1 and m[0].path == site and m[0].wants for m in best):
        wants = list(dict.fromkeys(m[0].wants for m in best))
        return [best[0][0]._replace(wants=" or ".join(wants), member=None)]
    strange = [f for f in best[0] if f.kind == "extra_forbidden" and all(any(f.path == g.path and g.kind == f.kind for g in m) for m in best)]
    if strange:
        return [f._replace(member=None) for f in strange]
    return [_Fault("alternatives", site, None, (), "", "")]


def _is_wrong_kind(fault: _Fault) -> bool:
    return fault.kind.endswith("_type") or fault.kind in ("literal_error", "enum", "none_required", "int_from_float")


def _explain(fault: _Fault, model: type[BaseModel], at: KeyPath, document: Document) -> Problem:
    path = (*at, *fault.path)
    if fault.kind == "missing" and isinstance(path[-1], str):
        return document.problem(path[:-1], f"the key '{path[-1]}' is missing")
    if fault.kind == "extra_forbidden":
        known = {key for m in _models_at(model, fault.path[:-1], fault.member) for key in _fields(m)}
        parent = document.label(path[:-1])
        message = unknown("key", short(str(path[-1])), known)
        return document.place(path, key=True).problem(f"{parent}: {message}" if parent else message)
    if fault.kind == "alternatives":
        shapes = " or ".join("{" + ", ".join(_fields(m)) + "}" for m in _models_at(model, fault.path, None))
        return document.problem(path, f"wants the keys of one of {shapes}")
    if not fault.wants:
        return document.problem(path, fault.text)
    near = did_you_mean(fault.found, re.findall(r"'([^']*)'", fault.wants)) if isinstance(fault.found, str) and fault.kind != "string_pattern_mismatch" else ""
    return document.problem(path, f"wants {fault.wants}, found {found_words(fault.found)}{near}")


def _models_at(annotation: Any, path: KeyPath, member: str | None) -> list[type[BaseModel]]:
    """The models that a value at `path` may be; only those of the union's `member`, if it names some."""
    models = [t for t in _types_at(annotation, path) if isinstance(t, type) and issubclass(t, BaseModel)]
    return [m for m in models if member and m.__name__ in member] or models


def _types_at(annotation: Any, path: KeyPath) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        yield from _types_at(get_args(annotation)[0], path)
    elif get_origin(annotation) in (Union, types.UnionType):
        for alternative in get_args(annotation):
            yield from _types_at(alternative, path)
    elif not path:
        yield annotation
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        inner = _fields(annotation).get(str(path[0]))
        yield from _types_at(inner.annotation, path[1:]) if inner else ()
    else:
        for item in get_args(annotation):  # of a list, tuple or mapping
            yield from _types_at(item, path[1:])


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Fields by the key that a recipe writes."""
    return {info.validation_alias if isinstance(info.validation_alias, str) else name: info for name, info in model.model_fields.items()}
