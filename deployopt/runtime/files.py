"""Atomic writes: a reader sees the old file or the whole new one, also after a power cut."""

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Union

from deployopt.errors import BuildFailed

_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")  # as `tempfile.mkstemp` names what `atomic_write` asks for


def fsync_directory(path: Path) -> None:
    """Make renames and new entries in a directory durable."""
    handle = os.open(str(path), os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_left_behind(name: str) -> bool:
    """Whether a file of this name is what `atomic_write` leaves beside its target when it is killed."""
    return _TEMPORARY.fullmatch(name) is not None


def atomic_write(path: Path, data: Union[bytes, str]) -> None:
    """Write beside the target, fsync, rename over it, fsync the directory.

    Raises:
        OSError: it cannot be written; `filename` is the target's.
    """
    try:
        _write(path, data.encode() if isinstance(data, str) else data)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def _write(path: Path, raw: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=str(path.parent))
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, str(path))
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    fsync_directory(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """While a file is read, changed and replaced: one process and thread at a time. The lock is a file beside it, and ends with whoever holds it.

    Raises:
        OSError: it cannot be locked.
    """
    with open(path.with_name(f"{path.name}.lock"), "ab") as beside:
        fcntl.flock(beside, fcntl.LOCK_EX)
        yield


@contextmanager
def built_onto(path: Path, size_bytes: int) -> Iterator[None]:
    """While a file of a build is written.

    Raises:
        BuildFailed: the disk, or this user's share of it, is full; says what was wanted and what is free.
    """
    try:
        yield
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent).free
        raise BuildFailed(
            f"no disk space for {path.name}: wanted {size_bytes / 1e6:.1f} MB, {free / 1e6:.1f} MB are free", "free some: deployopt cache prune"
        ) from exc


def atomic_write_json(path: Path, value: Any) -> None:
    """JSON with a two-space indent, keys in their order and no NaN. Raises ValueError for NaN and infinities."""
    atomic_write(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
