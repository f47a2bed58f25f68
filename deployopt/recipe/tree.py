"""YAML 1.2 into a tree in which every value has a place.

The core schema: `yes` is text, `1e-3` a number. Tags, anchors, aliases and merge keys are refused, as are duplicate keys, NaN and infinities,
so that each value stands in exactly one place and means the same to every reader.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from deployopt.errors import Problem
from deployopt.recipe.words import found_words, short

MAX_DEPTH = 32
KeyPath = tuple[str | int, ...]


# YAML 1.2.2, 5.1 (characters) and 10.3.2 (tag resolution of the core schema)
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_CONSTANTS = {"": None, "~": None} | {
    form: value for word, value in (("null", None), ("true", True), ("false", False)) for form in (word, word.title(), word.upper())
}
_YAML_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class Place(NamedTuple):
    """Where a value was written. Lines and columns count from 1; 0 for a value given with --set."""

    source: str
    line: int = 0
    column: int = 0

    def problem(self, message: str) -> Problem:
        return Problem(self.source, self.line, self.column, message)


@dataclass
class Node:
    """A scalar, a list of nodes or a mapping of nodes, with its place and the places of a mapping's keys.

    Attributes:
        readable: False for a scalar that could not be read; a problem says why, and its value is None.
    """

    value: Any
    place: Place
    keys: dict[str, Place] = field(default_factory=dict)
    readable: bool = True

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def walk(self) -> Iterator[Node]:
        """This node and all below."""
        yield self
        children = self.value.values() if isinstance(self.value, dict) else self.value if isinstance(self.value, list) else ()
        for child in children:
            yield from child.walk()

    def child(self, step: str | int) -> Node | None:
        if isinstance(self.value, dict) and isinstance(step, str):
            return self.value.get(step)
        if isinstance(self.value, list) and isinstance(step, int) and 0 <= step < len(self.value):
            node: Node = self.value[step]
            return node
        return None

    def put(self, key: str, child: Node) -> None:
        self.value[key] = child
        self.keys[key] = child.place


def compose(text: str, source: str, *, located: bool = True) -> tuple[Node | None, list[Problem]]:
    """The tree of a YAML text (None if it holds no value) and what is wrong with it. A syntax error ends the reading."""
    if bad := _UNPRINTABLE.search(text):
        line, column = text.count("\n", 0, bad.start()) + 1, bad.start() - text.rfind("\n", 0, bad.start())
        place = Place(source, line, column) if located else Place(source)
        return None, [place.problem(f"the character U+{ord(bad.group()):04X} is not allowed in YAML; write it as an escape in double quotes")]
    composer = _Composer(text, source, located)
    return composer.document(), composer.problems


class _Halt(Exception):
    """What follows cannot be read; the problem is recorded."""


class _Composer:
    """Builds nodes from ruamel's parse events, which carry every mark, tag and anchor; recursion is bounded by MAX_DEPTH."""

    def __init__(self, text: str, source: str, located: bool) -> None:
        from ruamel.yaml import YAML

        self.problems: list[Problem] = []
        self._source = source
        self._located = located
        self._here = Place(source)
        self._events = YAML(typ="safe", pure=True).parse(text)

    def document(self) -> Node | None:
        from ruamel.yaml.error import MarkedYAMLError

        try:
            return self._document()
        except _Halt:
            pass
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self.problems.append((self._place(mark) if mark else self._here).problem(_syntax(error)))
        except (ValueError, OverflowError) as error:  # ruamel passes an escape like "\UFFFFFFFF" to chr()
            self.problems.append(self._here.problem(f"not valid YAML: an escape in the next text is no character ({error})"))
        return None

    def _document(self) -> Node | None:
        root: Node | None = None
        documents = 0
        while (read := self._next())[0] != "StreamEnd":
            name, event = read
            if name == "DocumentStart":
                documents += 1
                if documents > 1:
                    self._halt("a second document begins here; a recipe is one document, so remove the '---' line")
                if event.version not in (None, (1, 2)):
                    self._halt("recipes are YAML 1.2; remove the %YAML line")
            elif name not in ("StreamStart", "DocumentEnd"):
                root = self._node(read, 1)
        blank = root is not None and root.value is None
        return None if blank and self._located else root

    def _next(self) -> tuple[str, Any]:
        """The next event's kind and the event."""
        event = next(self._events)
        self._here = self._place(event.start_mark)
        return type(event).__name__.removesuffix("Event"), event

    def _place(self, mark: Any) -> Place:
        return Place(self._source, mark.line + 1, mark.column + 1) if self._located else Place(self._source)

    def _halt(self, message: str) -> None:
        self.problems.append(self._here.problem(message))
        raise _Halt

    def _node(self, read: tuple[str, Any], depth: int) -> Node:
        name, event = read
        here = self._here
        if depth > MAX_DEPTH:
            self._halt(f"nested more than {MAX_DEPTH} deep")
        if name == "Alias" or event.anchor is not None:
            self.problems.append(
                here.problem(f"anchors and aliases are not allowed in a recipe (found '{'*' if name == 'Alias' else '&'}{event.anchor}'); write the value out")
            )
        if name == "Alias":
            return Node(None, here, readable=False)
        if event.tag is not None:
            self.problems.append(here.problem(f"tags are not allowed in a recipe (found '{short(event.tag.replace(_YAML_TAG, '!!'))}'); remove it"))
        if name == "Scalar":
            return self._scalar(event.value, event.style)
        return self._mapping(here, depth) if name == "MappingStart" else self._sequence(here, depth)

    def _sequence(self, here: Place, depth: int) -> Node:
        items: list[Node] = []
        while (read := self._next())[0] != "SequenceEnd":
            items.append(self._node(read, depth + 1))
        return Node(items, here)

    def _mapping(self, here: Place, depth: int) -> Node:
        mapping = Node({}, here)
        while (read := self._next())[0] != "MappingEnd":
            key = self._node(read, depth + 1)
            value = self._node(self._next(), depth + 1)
            if not isinstance(key.value, str):
                self.problems.append(key.place.problem(f"a key must be text, found {found_words(key.plain())}; quote it if it is meant"))
            elif key.value in mapping.value:
                first = mapping.keys[key.value]
                self.problems.append(
                    key.place.problem(
                        f"duplicate key '{short(key.value)}'" + (f", first given at line {first.line}, column {first.column}" if first.line else "")
                    )
                )
            else:
                mapping.put(key.value, value)
                mapping.keys[key.value] = key.place
        return mapping

    def _scalar(self, text: str, style: str | None) -> Node:
        if not style and text in _CONSTANTS:
            return Node(_CONSTANTS[text], self._here)
        if not style and _INT.fullmatch(text):
            number = int(text, 0 if text.startswith(("0o", "0x")) else 10) if len(text) < 32 else 1 << 64
            return self._checked(number, -(1 << 63) <= number < 1 << 63, f"whole numbers have at most 64 bits, found {short(text)}")
        if not style and _FLOAT.fullmatch(text):
            decimal = math.nan if "n" in text.lower() else float(text)  # .nan and .inf
            return self._checked(decimal, math.isfinite(decimal), f"a number must be finite, found {short(text)}")
        if _CONTROL.search(text):
            self.problems.append(self._here.problem("text must not hold control characters"))
        try:  # JSON writes U+1F600 as two escapes
            return Node(text.encode("utf-16-le", "surrogatepass").decode("utf-16-le"), self._here)
        except UnicodeDecodeError:
            return self._checked("", False, "text holds half of a surrogate pair")

    def _checked(self, value: Any, good: bool, message: str) -> Node:
        if not good:
            self.problems.append(self._here.problem(message))
        return Node(value if good else None, self._here, readable=good)


def _syntax(error: Any) -> str:
    """What ruamel's MarkedYAMLError means."""
    problem = str(error.problem or error.context).replace("<stream end>", "the end of the file")
    if "'\\t'" in problem:
        return "not valid YAML: a tab cannot indent; use spaces"
    begun = f" ({error.context} that begins at line {error.context_mark.line + 1})" if error.context and error.context_mark else ""
    return f"not valid YAML: {problem}{begun}"
