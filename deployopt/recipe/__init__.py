"""A recipe: YAML in which every value has a position, `--set` overrides, a strict top level, and all problems at once.

`read_document` → `Document` (values and places) → `parse` → `Recipe`; the planner checks each stage's options with `bind`.
"""

from deployopt.recipe.binding import bind
from deployopt.recipe.document import Document, read_document
from deployopt.recipe.model import Budget, DataSection, ModelConfig, Outline, Recipe, Section, StageEntry, load_recipe, outline, parse
from deployopt.recipe.schema import json_schema

__all__ = [
    "Budget",
    "DataSection",
    "Document",
    "ModelConfig",
    "Outline",
    "Recipe",
    "Section",
    "StageEntry",
    "bind",
    "json_schema",
    "load_recipe",
    "outline",
    "parse",
    "read_document",
]
