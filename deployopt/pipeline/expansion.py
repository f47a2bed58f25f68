"""Stages in the recipe's order → the steps that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from deployopt.errors import OptionRefused, UsageError
from deployopt.recipe.tree import KeyPath
from deployopt.stages import Expansion, Planning, Point, Stage, StageConfig


@dataclass(frozen=True)
class Entry:
    """A stage instance. `at`: path of its options in the document; the planned `init` has none."""

    stage_name: str
    name: str
    stage: Stage
    config: StageConfig
    at: KeyPath = ()


class Fault(NamedTuple):
    """What is wrong with the value (or, with `key`, the key) at a path of the document."""

    at: KeyPath
    message: str
    key: bool = False


@dataclass(frozen=True)
class Asked:
    """A step that a stage instance asks for. `id`: its folder in the run; the inputs' points say which steps make them."""

    id: str
    entry: Entry
    expansion: Expansion

    @property
    def points(self) -> list[Point]:
        """What it will make."""
        return [replace(point, step=self.id) for point in self.expansion.makes]


def expand(entries: Sequence[Entry], *, here: bool) -> tuple[list[Asked], list[Fault]]:
    """All steps of a recipe, and what stages refuse; a step that would make again what another makes is a fault and left out.

    Args:
        entries: `init` first.
        here: the stages may ask what works on this machine (`Planning.here`).
    """
    steps: list[Asked] = []
    faults: list[Fault] = []
    makers: dict[object, Entry] = {}
    for number, entry in enumerate(entries):
        try:
            asked = _steps(number, entry, Planning([p for step in steps for p in step.points], entry.name, here))
        except OptionRefused as error:
            faults.append(Fault((*entry.at, *error.option.split(".")), str(error)))
            continue
        except UsageError as error:
            faults.append(Fault(entry.at, str(error), key=True))
            continue
        again: dict[str, str] = {}  # what → its first maker
        for step in asked:
            made = {(p.kind, p.variant, p.backend, p.precision): _name(p) for p in step.points} | {step.id: step.id}
            clashing = {name: makers[what].name for what, name in made.items() if what in makers}
            again |= clashing
            if not clashing:
                makers |= dict.fromkeys(made, entry)
                steps.append(step)
        if again:
            faults.append(Fault(entry.at, _sentence(again), key=True))
    return steps, faults


def _steps(number: int, entry: Entry, planning: Planning) -> list[Asked]:
    stem = "init" if entry.stage_name == "init" else f"{number - 1:02d}-{entry.name}"
    found = entry.stage.expand(entry.config, planning)
    return [Asked(f"{stem}-{expansion.label}" if expansion.label else stem, entry, expansion) for expansion in found]


def _name(point: Point) -> str:
    return "/".join(part for part in (point.variant, point.backend, point.precision) if part)


def _sentence(again: dict[str, str], most: int = 3) -> str:
    names = [*again][:most] + ([f"{len(again) - most} more"] if len(again) > most else [])
    makers = "' and '".join(dict.fromkeys(again.values()))
    return f"makes {', '.join(names)} again, which '{makers}' makes already: leave each to one stage"
