"""Run folders and the content-addressed cache of steps.

A step is written into `*.partial`, fsynced and renamed; its `DONE`, with the sha256 of every file, comes last. A reader trusts only
what `DONE` vouches for. Steps live in the cache under their key and are hard-linked into the run folder, so that pruning the
cache leaves finished runs whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from deployopt.errors import ArtifactCorrupt, LackingEnvironment, RunLocked, UsageError
from deployopt.runtime.files import atomic_write_json, fsync_directory
from deployopt.runtime.hashing import sha256_file, sha256_json

T = TypeVar("T")
DONE = "DONE"
_SHA256 = re.compile("[0-9a-f]{64}")
FORMAT = 2  # of DONE and of the artifacts' digests; another one is a miss
SIZE_CAP_VARIABLE, SIZE_CAP = "DEPLOYOPT_CACHE_MAX_SIZE", "20GB"


def cache_home() -> Path:
    """`$XDG_CACHE_HOME/deployopt`, by default `~/.cache/deployopt` (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deployopt"


def size_cap() -> int:
    """Bytes that a run leaves in the cache at most, beside what it used itself: $DEPLOYOPT_CACHE_MAX_SIZE, by default 20 GB.

    Raises:
        UsageError: the variable holds no size.
    """
    return parse_size(SIZE_CAP_VARIABLE, os.environ.get(SIZE_CAP_VARIABLE) or SIZE_CAP)


def parse_size(name: str, text: str) -> int:
    """Bytes of "20GB", "500 MB" or "0", in decimal units. Raises UsageError, which calls it by `name`."""
    for suffix, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("B", 1), ("", 1)):
        if text.upper().endswith(suffix):
            number = text[: len(text) - len(suffix)].strip()
            try:
                value = float(number)
            except ValueError:
                break
            if 0 <= value < float("inf"):
                return int(value * factor)
            break
    raise UsageError(f"{name}: wanted a size such as 20GB or 500MB; found '{text}'")


@dataclass(frozen=True)
class Entry:
    """A finished step in the cache.

    Attributes:
        key: sha256 of `parts`.
        parts: everything the result depends on, as JSON.
        files: relative path → sha256.
        inputs: digests of the steps it really read.
        digest: of its own files.
        seconds: its run took.
    """

    folder: Path
    key: str
    parts: Mapping[str, Any]
    files: Mapping[str, str]
    inputs: tuple[str, ...]
    digest: str
    seconds: float

    @property
    def size_bytes(self) -> int:
        return sum((self.folder / name).stat().st_size for name in self.files if (self.folder / name).exists())

    def verify(self) -> None:
        """Hash every file again.

        Raises:
            ArtifactCorrupt: a file is gone or its bytes differ.
        """
        for name, wanted in self.files.items():
            path = self.folder / name
            if not path.is_file():
                raise ArtifactCorrupt(f"{name} is missing from the cached step {self.key[:12]}")
            if sha256_file(path) != wanted:
                raise ArtifactCorrupt(f"{name} in the cached step {self.key[:12]} is not what was written (sha256 differs)")


@dataclass(frozen=True)
class Miss:
    """Why a step is not in the cache, and how long its nearest relative took (None: unknown)."""

    why: str
    seconds: float | None = None


class StoredChoices:
    """Decisions made by timing, kept beside the cache so that they outlive a kill (`stages.Choices`).

    Args:
        path: of the JSON file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def get_or_make(self, name: str, make: Callable[[], T]) -> T:
        """The stored choice, else `make()` (a JSON value), stored before it is returned."""
        stored: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        if name not in stored:
            stored[name] = make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_json(self.path, stored)
        return stored[name]  # type: ignore[no-any-return]


class Cache:
    """Finished steps by key. Safe to share between processes: one step is computed by one process at a time."""

    def __init__(self, home: Path | None = None) -> None:
        self.home = home or cache_home()
        self._steps, self._choices, self._durations = (self.home / name for name in ("steps", "choices", "durations"))

    def find(self, key: str, inputs: tuple[str, ...] | None = None) -> Entry | Miss:
        """The verified entry of a key, or why there is none.

        Args:
            key: of the step.
            inputs: digests of the steps it would read; None skips that check.
        """
        folder = self._steps / key
        if not (folder / DONE).exists():
            return Miss("not run before")
        try:
            entry = self._read(folder)
            entry.verify()
        except (ArtifactCorrupt, ValueError, KeyError, OSError) as error:
            return Miss(f"cached copy is damaged: {error}")
        if inputs is not None and entry.inputs != inputs:
            return Miss("an input was made anew and differs", entry.seconds)
        return entry

    def explain(self, parts: Mapping[str, Any], label: str) -> Miss:
        """Name what changed since the most similar step of this stage and label on the same network, data and task."""
        wanted = (parts["stage"], label, _subject(parts))
        relatives = [e for e in self.entries() if (e.parts.get("stage"), e.parts.get("label"), _subject(e.parts)) == wanted]
        if not relatives:
            return Miss("not run before")
        changes = {e.key: changed(e.parts, parts) for e in relatives}
        nearest = min(relatives, key=lambda e: (len(changes[e.key]), -(e.folder / DONE).stat().st_mtime))
        return Miss("; ".join(changes[nearest.key]) or "not finished before", nearest.seconds)

    @contextmanager
    def holding(self, key: str, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Keep other processes from making, replacing or pruning this key. Calls `on_wait` if one of them does just now."""
        lock = self._lock(key)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def writing(self, key: str) -> Iterator[Path]:
        """A fresh folder to write into; the caller holds the key and ends with `commit`. Removed if it does not."""
        self._steps.mkdir(parents=True, exist_ok=True)
        partial = self._steps / f"{key}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
        partial.mkdir()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def commit(self, partial: Path, key: str, parts: Mapping[str, Any], inputs: tuple[str, ...], seconds: float) -> Entry:
        """Make the partial folder the entry of `key`."""
        files = {p.relative_to(partial).as_posix(): sha256_file(p) for p in sorted(partial.rglob("*")) if p.is_file()}
        for name in files:
            with open(partial / name, "rb") as stream:
                os.fsync(stream.fileno())
        for folder in {(partial / name).parent for name in files} | {partial}:
            fsync_directory(folder)
        final = self._steps / key
        shutil.rmtree(final, ignore_errors=True)  # damaged or outdated
        partial.rename(final)
        fsync_directory(self._steps)
        done = {
            "format": FORMAT,
            "key": key,
            "parts": dict(parts),
            "files": files,
            "inputs": list(inputs),
            "seconds": round(seconds, 3),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        atomic_write_json(final / DONE, done)
        return self._read(final)

    def remember_seconds(self, key: str, seconds: float) -> None:
        """How long a step took that is never cached, for the next plan."""
        self._durations.mkdir(parents=True, exist_ok=True)
        atomic_write_json(self._durations / f"{key}.json", round(seconds, 3))

    def seconds(self, key: str) -> float | None:
        """What `remember_seconds` was told last; None if nothing."""
        path = self._durations / f"{key}.json"
        return float(json.loads(path.read_text())) if path.exists() else None

    def choices(self, key: str, inputs: tuple[str, ...], *, fresh: bool = False) -> StoredChoices:
        """Decisions of a step.

        Args:
            inputs: digests of the steps it reads: what was decided about other weights does not hold for these.
            fresh: forget those made before.
        """
        path = self._choices / f"{key}-{sha256_json(list(inputs))[:16]}.json"
        if fresh:
            path.unlink(missing_ok=True)
        return StoredChoices(path)

    def entries(self) -> list[Entry]:
        """All readable entries, unverified; damaged ones are left out."""
        found = []
        for folder in sorted(self._steps.glob("*")) if self._steps.exists() else []:
            if (folder / DONE).exists():
                try:
                    found.append(self._read(folder))
                except (ValueError, KeyError, OSError):
                    continue  # `find` tells the one who asks for it; here it is just not a relative
        return found

    def listing(self) -> list[dict[str, Any]]:
        """What lies here, newest first: key, stage, label, bytes, seconds its run took, time of last use."""
        rows = [
            {
                "key": e.key,
                "stage": e.parts.get("stage"),
                "label": e.parts.get("label"),
                "bytes": e.size_bytes,
                "seconds": e.seconds,
                "used": datetime.fromtimestamp((e.folder / DONE).stat().st_mtime, UTC).isoformat(timespec="seconds"),
            }
            for e in self.entries()
        ]
        return sorted(rows, key=lambda row: str(row["used"]), reverse=True)

    def prune(self, max_bytes: int, spare: Collection[str] = ()) -> tuple[int, int]:
        """Remove what killed runs left, then the longest unused entries until at most `max_bytes` are left.

        An entry's choices go with it. Choices of steps that were never finished, and durations of steps that are never cached, go when they are older
        than what was removed. Locks stay: they are empty, and two processes could hold locks of one name if one of them removed its file.

        Args:
            spare: keys that are kept, as those that another process holds are.

        Returns:
            (entries removed, bytes left).
        """
        for left_behind in [p for p in self._steps.glob("*") if not (p / DONE).exists()] if self._steps.exists() else []:
            self._remove(left_behind)
        sized = sorted(((_used(e.folder / DONE), e, e.size_bytes) for e in self.entries()), key=lambda found: found[0])
        left, removed = sum(size for *_, size in sized), 0
        for used, entry, size in sized:
            if left <= max_bytes:
                break
            if entry.key not in spare and self._remove(entry.folder):
                left, removed = left - size, removed + 1
                self._forget(entry.key, used)
        return removed, left

    def _forget(self, key: str, until: float) -> None:
        """Drop a removed entry's choices, and whatever belongs to no entry and was last written before `until`."""
        kept = {p.name for p in self._steps.glob("*")}
        for path in self._choices.glob("*.json"):
            owner = path.name.partition("-")[0]
            if owner == key or (owner not in kept and _used(path) < until):
                path.unlink(missing_ok=True)
        for path in self._durations.glob("*.json"):
            if _used(path) < until:
                path.unlink(missing_ok=True)

    def _lock(self, key: str) -> FileLock:
        locks = self.home / "locks"
        try:
            locks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LackingEnvironment(f"the cache {self.home} cannot be written: {error.strerror}", "set XDG_CACHE_HOME to a folder that can") from error
        return FileLock(locks / f"{key}.lock")

    def _remove(self, folder: Path) -> bool:
        """Whether the folder is gone; False if a process holds its key."""
        lock = self._lock(folder.name.removesuffix(".partial"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        try:
            (folder / DONE).unlink(missing_ok=True)  # first, so that a reader never sees a half-removed entry
            shutil.rmtree(folder)
        finally:
            lock.release()
        return True

    @staticmethod
    def _read(folder: Path) -> Entry:
        done = json.loads((folder / DONE).read_text())
        if done["format"] != FORMAT:
            raise ValueError(f"cache format {done['format']}, wanted {FORMAT}")
        return Entry(folder, done["key"], done["parts"], done["files"], tuple(done["inputs"]), sha256_json(done["files"]), done["seconds"])


def _used(path: Path) -> float:
    """When a file was last written or touched; the Unix epoch for one that has just gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def touch(entry: Entry) -> None:
    """Mark an entry as used now, for `Cache.prune`."""
    os.utime(entry.folder / DONE)


def link(entry: Entry, into: Path) -> None:
    """Hard-link an entry into a run folder; copies where the file system differs. Replaces what an earlier run left there."""
    shutil.rmtree(into, ignore_errors=True)
    for name in (*entry.files, DONE):
        target = into / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(entry.folder / name, target)
        except OSError:
            shutil.copy2(entry.folder / name, target)


def _subject(parts: Mapping[str, Any]) -> dict[str, Any]:
    """What a step is about: figures of another one say nothing of it. Versions of it are left out: other weights, images or packages."""
    of = {section: dict(parts.get(section) or {}) for section in ("model", "data", "task")}
    for section, version in (("model", "weights"), ("model", "package"), ("data", "fingerprint"), ("task", "package")):
        of[section].pop(version, None)
    return of


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Differences of two key parts, one phrase each ("config.lr: 0.01 → 0.001")."""
    before, after = _flat(old), _flat(new)
    phrases = []
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            if name.startswith("inputs."):
                phrases.append("an input changed")
            else:
                phrases.append(f"{name}: {_shown(before.get(name, 'unset'))} → {_shown(after.get(name, 'unset'))}")
    return sorted(set(phrases))


def _shown(value: Any) -> str:
    """Hashes by their first digits."""
    return f"{value[:12]}…" if isinstance(value, str) and _SHA256.fullmatch(value) else str(value)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {k: v for name, item in value.items() for k, v in _flat(item, f"{prefix}{name}.").items()}
    if isinstance(value, list | tuple) and any(isinstance(v, Mapping | list | tuple) for v in value):
        return {k: v for i, item in enumerate(value) for k, v in _flat(item, f"{prefix}{i}.").items()}
    if isinstance(value, list | tuple) and prefix == "inputs.":
        return {f"{prefix}{i}": item for i, item in enumerate(value)}
    return {prefix.rstrip("."): value}


def new_run_folder(parent: Path, recipe_name: str, recipe_sha256: str) -> Path:
    """`parent/<recipe>-<utc>-<hash8>`, created."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    folder = parent / f"{recipe_name}-{stamp}-{recipe_sha256[:8]}"
    _make_run_folder(folder)
    return folder


def _make_run_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LackingEnvironment(f"the run folder {folder} cannot be made: {error.strerror}", "choose another folder with --run-dir") from error


@contextmanager
def locked(run_folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder; the lock dies with the process.

    Raises:
        RunLocked: names the process that works there.
        LackingEnvironment: the folder cannot be made or written.
    """
    owner = run_folder / ".owner.json"
    lock = FileLock(run_folder / ".lock")
    try:
        _make_run_folder(run_folder)
        lock.acquire(timeout=0)
    except Timeout as error:
        try:
            holder = json.loads(owner.read_text())
            who = f"process {holder['pid']}, since {holder['since']}"
        except (OSError, ValueError, KeyError):
            who = "another process"
        raise RunLocked(
            f"the run folder {run_folder.name} is being worked in by {who}", "wait for it, stop it, or choose another folder with --run-dir"
        ) from error
    except OSError as error:
        raise LackingEnvironment(f"the run folder {run_folder} cannot be written: {error.strerror}", "choose another folder with --run-dir") from error
    try:
        atomic_write_json(owner, {"pid": os.getpid(), "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
