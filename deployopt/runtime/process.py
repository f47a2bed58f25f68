"""Talking about and across processes: how one ended or is interrupted, what it last said, and our errors as JSON."""

import atexit
import contextlib
import os
import signal
import sys
from typing import IO, Any, Dict, Iterator, List, Mapping, NoReturn, Optional

from deployopt import errors
from deployopt.errors import DeployoptError, StageFailed


def leave(code: int) -> NoReturn:
    """End this process, its exit handlers called and its output written. The interpreter is not taken down: with PyTorch's modules in it that takes
    one to two seconds, and vendors' libraries have been seen to crash meanwhile."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader left; it is closed
            stream.flush()
    os._exit(code)


def describe_exit(returncode: int) -> str:
    """A return code of `subprocess` as the end of a sentence: "was ended by SIGSEGV"."""
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    known = {s.value: s.name for s in signal.Signals}
    return f"was ended by {known.get(-returncode, f'signal {-returncode}')}"


def tail(stream: IO[bytes], lines: int = 8, limit: int = 65536) -> str:
    """The last non-empty lines of a seekable file that a child wrote its stderr to, each on a line of its own, indented."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - limit))
    said = [line for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
    return "".join(f"\n  {line}" for line in said[-lines:])


def error_to_json(error: BaseException) -> Dict[str, Any]:
    """An exception as JSON: its nearest class in our tree (None for a foreign one), message, remedy and simple attributes."""
    if not isinstance(error, DeployoptError):
        return {"type": None, "message": f"{type(error).__name__}: {error}", "remedy": None, "facts": {}}
    nearest = next(c for c in type(error).__mro__ if c.__module__ == errors.__name__)
    facts = {k: v for k, v in vars(error).items() if isinstance(v, (str, int, float, bool, type(None)))}
    return {"type": nearest.__name__, "message": error.message, "remedy": error.remedy, "facts": facts}


def error_from_json(data: Mapping[str, Any], doing: str) -> DeployoptError:
    """The exception again; a foreign one becomes StageFailed and begins with what was being done."""
    if data["type"] is None:
        return StageFailed(f"{doing}: {data['message']}")
    cls = getattr(errors, data["type"])
    error = cls.__new__(cls)  # leaves differ in their constructors; all hold a message and a remedy
    DeployoptError.__init__(error, data["message"], data["remedy"])
    vars(error).update(data["facts"])
    assert isinstance(error, DeployoptError)
    return error


@contextlib.contextmanager
def interrupts_kept() -> Iterator[None]:
    """Ctrl-C stays a KeyboardInterrupt where a library that it hits fails with something else meanwhile, as PyTorch may ("mode stack")."""
    try:
        yield
    except Exception as exc:
        behind: List[Optional[BaseException]] = [exc]
        for error in behind:  # grows while it is walked
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt from exc
            if error is not None:
                behind += [other for other in (error.__cause__, error.__context__) if not any(other is known for known in behind)]
        raise
