"""The base of everything a recipe configures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic.json_schema import JsonSchemaValue

    from deployopt.plugins import Kind


class OptionsOf(NamedTuple):
    """On a field that maps names of a kind's modules to their options: the planner checks each against that module's own `Options`.

    Attributes:
        among: the field that lists the names that may have options.
    """

    kind: Kind
    among: str


class ForLoss(NamedTuple):
    """On a field that means something with one training loss only: the planner refuses it, unless it is off, where the task has another."""

    name: str


class Strict(BaseModel):
    """Frozen; unknown keys, wrong types, NaN and infinities are refused. The docstring under a field is its description in the JSON Schema."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    NOT_IN_KEY: ClassVar[frozenset[str]] = frozenset()
    """Options that no result depends on: changing them invalidates nothing in the cache."""

    def keyed(self) -> dict[str, Any]:
        """The options that results depend on, as JSON values."""
        return self.model_dump(mode="json", by_alias=True, exclude=set(self.NOT_IN_KEY))

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        # pydantic's own `use_attribute_docstrings` reads sources when a class is made, which every command would wait for
        schema = handler(core_schema)
        descriptions = {field.alias or name: text for name, text in _docstrings(cls).items() if (field := cls.model_fields.get(name))}
        for name, entry in handler.resolve_ref_schema(schema).get("properties", {}).items():
            if name in descriptions:
                entry["description"] = descriptions[name]
        return schema


def _docstrings(cls: type) -> dict[str, str]:
    """The string that follows each annotated attribute, of this class and its bases."""
    import ast
    import inspect
    import textwrap

    found: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if issubclass(c, Strict)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = inspect.cleandoc(text)
    return found
