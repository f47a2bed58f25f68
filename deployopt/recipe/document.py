"""A recipe's values with their places, and `--set` overrides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

from deployopt.errors import Problem, RecipeError
from deployopt.plugins import did_you_mean, unknown
from deployopt.recipe.tree import MAX_DEPTH, KeyPath, Node, Place, compose
from deployopt.recipe.words import found_words, short
from deployopt.runtime.hashing import sha256_json

MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """A recipe's values and where each was written.

    Attributes:
        problems: of single values and overrides; the rest can be read and checked all the same.
    """

    source: str
    root: Node = field(repr=False)
    problems: tuple[Problem, ...] = field(default=(), repr=False)

    @cached_property
    def data(self) -> dict[str, Any]:
        """Plain Python values, overrides applied."""
        plain: dict[str, Any] = self.root.plain()
        return plain

    @cached_property
    def sha256(self) -> str:
        """Of the values, independent of layout and key order."""
        return sha256_json(self.data)

    def to_yaml(self) -> str:
        """The values as a recipe that can be run again, overrides applied."""
        from ruamel.yaml import YAML

        stream = StringIO()
        yaml: Any = YAML(typ="safe", pure=True)  # its attributes are typed as the None they start with
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False
        yaml.dump(self.data, stream)
        return stream.getvalue()

    def place(self, path: KeyPath, *, key: bool = False) -> Place:
        """Of the value at `path`, or of its key, or of the nearest ancestor that was written."""
        node = self.root
        for depth, step in enumerate(path):
            child = node.child(step)
            if child is None:
                return node.place
            if key and depth == len(path) - 1 and isinstance(step, str):
                return node.keys[step]
            node = child
        return node.place

    def position(self, path: KeyPath) -> tuple[int, int]:
        """Line and column from 1 of the value at `path` or its nearest ancestor; (0, 0) for a value given with --set."""
        return self.place(path)[1:]

    def label(self, path: KeyPath) -> str:
        """`path` as --set spells it: ("stages", 2, "qat", "lr") is "stages.qat.lr"."""
        steps = [str(step) for step in path]
        stages = self.data.get("stages")
        if len(path) > 1 and path[0] == "stages" and isinstance(stages, list) and isinstance(path[1], int):
            steps[1:3] = [_addresses(stages)[path[1]]]
        return ".".join(steps)

    def problem(self, path: KeyPath, message: str, *, key: bool = False) -> Problem:
        """A fault of the value (or the key) at `path`."""
        label = self.label(path)
        return self.place(path, key=key).problem(f"{label}: {message}" if label else message)

    def of_readable(self, problems: Iterable[Problem]) -> list[Problem]:
        """Without those of values that could not be read: `problems` of the document already say why."""
        unread = {node.place for node in self.root.walk() if not node.readable}
        return [p for p in problems if Place(p.source, p.line, p.column) not in unread]


def read_document(path: str | Path, overrides: Sequence[str] = ()) -> Document:
    """Read a recipe and apply `--set` overrides ("KEY=VALUE", VALUE in YAML, empty means null), in order.

    Values that cannot be read and overrides that cannot be meant are left out and told in the document's `problems`.

    Raises:
        RecipeError: the file cannot be read, is no YAML, or no mapping.
    """
    source = str(path)
    root, problems = compose(_read_text(Path(path), source), source)
    if root is None and not problems:
        problems.append(Place(source).problem("the file is empty; a recipe needs name, model, data and stages"))
    elif root is not None and not isinstance(root.value, dict):
        problems.append(root.place.problem(f"a recipe is a mapping (name, model, data, stages …), found {found_words(root.plain())}"))
    if root is None or not isinstance(root.value, dict):
        raise RecipeError(problems)
    for assignment in overrides:
        problems += _override(root, assignment)
    return Document(source, root, tuple(problems))


def _read_text(path: Path, source: str) -> str:
    try:
        with open(path, "rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise RecipeError([Place(source).problem(_unreadable(path, error))]) from error
    if len(raw) > MAX_BYTES:
        raise RecipeError([Place(source).problem(f"a recipe has at most {MAX_BYTES} bytes; this file is larger")])
    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + len(raw) - len(error.object)
        message = f"a recipe is UTF-8 text; found byte 0x{raw[offset]:02x} at offset {offset}"
        raise RecipeError([Place(source, raw.count(b"\n", 0, offset) + 1, 1).problem(message)]) from error
    return text


def _unreadable(path: Path, error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        if not path.parent.is_dir():
            return f"no such file, nor a folder '{path.parent}'"
        return "no such file" + _alternatives(path.name, path.parent)
    if isinstance(error, IsADirectoryError):
        return "this is a folder, not a recipe" + _alternatives("", path)
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def _alternatives(name: str, folder: Path) -> str:
    files = sorted(p.name for p in folder.glob("*.y*ml"))
    listed = f" (in that folder: {', '.join(files[:8])}{' …' if len(files) > 8 else ''})" if files else ""
    return did_you_mean(name, files) + listed


def stage_of(item: Any) -> tuple[str | None, str | None]:
    """Stage and `as` of an item of `stages`; (None, None) if it is not one."""
    if isinstance(item, str):
        return item, None
    keys = [key for key in item if key != "as"] if isinstance(item, dict) else []
    if len(keys) != 1:
        return None, None
    alias = item.get("as")
    return keys[0], alias if isinstance(alias, str) else None


def _addresses(items: Sequence[Any]) -> list[str]:
    """What --set calls each stage: its `as`, else its stage, numbered from 1 where that stands more than once without `as`."""
    stages = [stage_of(item) for item in items]
    seen: Counter[str] = Counter()
    addresses = []
    for index, (stage, alias) in enumerate(stages):
        if stage is not None and alias is None:
            seen[stage] += 1
            addresses.append(f"{stage}_{seen[stage]}" if stages.count((stage, None)) > 1 else stage)
        else:
            addresses.append(alias or str(index))
    return addresses


class _Refused(Exception):
    """An override that cannot be meant, and why."""


def _override(root: Node, assignment: str) -> list[Problem]:
    """Put one KEY=VALUE into the tree."""
    key, equals, text = assignment.partition("=")
    place = Place(f"--set {short(assignment)}")
    steps = [step.strip() for step in key.split(".")]
    if not equals or "" in steps or len(steps) > MAX_DEPTH:
        return [place.problem("wanted KEY=VALUE with KEY such as model.arch or stages.qat.lr")]
    value, problems = compose(text, place.source, located=False)
    if problems:
        return problems
    try:
        node, inner = _stage_options(root, steps) if steps[0] == "stages" and len(steps) > 1 else (root, steps)
        for depth, step in enumerate(inner[:-1]):
            node = _descend(node, step, place, ".".join(steps[: len(steps) - len(inner) + depth]))
        _assign(node, inner[-1], value or Node(None, place), ".".join(steps[:-1]))
    except _Refused as error:
        return [place.problem(str(error))]
    return []


def _stage_options(root: Node, steps: list[str]) -> tuple[Node, list[str]]:
    """The mapping that holds a stage's options, and the path from there. Raises _Refused."""
    stages = root.child("stages")
    if stages is None or not isinstance(stages.value, list):
        raise _Refused("the recipe has no list 'stages'")
    items = stages.plain()
    index = _find_stage(items, steps[1])
    stage, _ = stage_of(items[index])
    if stage is None:
        raise _Refused(f"item {index} of stages is not a stage")
    if isinstance(items[index], str):
        old = stages.value[index].place
        stages.value[index] = Node({stage: Node(None, old)}, old, {stage: old})
    return stages.value[index], [stage, *steps[2:]]


def _find_stage(items: Sequence[Any], wanted: str) -> int:
    if wanted.isdecimal():
        if int(wanted[:9]) >= len(items):
            raise _Refused(f"there is no stage {wanted}; the recipe has {len(items)}, counted from 0")
        return int(wanted)
    addresses = _addresses(items)
    found = [i for i, address in enumerate(addresses) if address == wanted] or [i for i, item in enumerate(items) if stage_of(item)[0] == wanted]
    if not found:
        raise _Refused(unknown("stage", wanted, addresses))
    if len(found) > 1:
        choices = [addresses[i] if addresses.count(addresses[i]) == 1 else str(i) for i in found]
        raise _Refused(f"'{wanted}' stands {len(found)} times among the stages; say which: {', '.join(f'stages.{c}' for c in choices)}")
    return found[0]


def _descend(node: Node, step: str, place: Place, label: str) -> Node:
    """The child to go on from; a mapping is created where there was none or null."""
    if not isinstance(node.value, dict):
        child: Node = node.value[_index(node, step, label)]
        return child
    if step not in node.value:
        node.put(step, Node(None, place))
    child = node.value[step]
    if child.value is None:
        child.value, child.place = {}, place
    return child


def _assign(node: Node, step: str, value: Node, label: str) -> None:
    if isinstance(node.value, dict):
        node.put(step, value)
    else:
        node.value[_index(node, step, label)] = value


def _index(node: Node, step: str, label: str) -> int:
    if not isinstance(node.value, list):
        raise _Refused(f"'{label}' is {found_words(node.value)} and has no key '{step}'")
    if not step.isdecimal() or int(step[:9]) >= len(node.value):
        raise _Refused(f"'{label}' is a list of {len(node.value)} items, counted from 0; found '{step}'")
    return int(step)
