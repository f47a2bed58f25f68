"""A call in a spawned process, or several side by side: native code may crash there without taking the run along.

The child gets one JSON request on its standard input and answers with JSON lines. Its input stays open while the caller wants the
result: when it closes (Ctrl-C in the caller, or the caller died) the call is interrupted, and soon after ended whatever it does.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from _thread import interrupt_main
from typing import IO, Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Type

from deployopt.errors import BuildFailed, DeployoptError, StageFailed
from deployopt.runtime.process import describe_exit, error_from_json, error_to_json, leave, tail
from deployopt.runtime.progress import Bar, ContextManagerOfBar, Progress, SilentProgress

GRACE_SECONDS = 0.5  # with the time it takes to end a process on a busy machine, Ctrl-C is honoured within a second
LAST_WORDS_SECONDS = 1.0  # in which those that lost a companion may say why they fail
Message = Dict[str, Any]
_OVERDUE = "allow it more time, in a recipe by build.timeout_minutes, or a faster build"
_FOREIGN = "the log has the traceback; what it does not explain, as memory that ran out, is a fault to report"


def run_in_child(target: str, arguments: Mapping[str, Any], progress: Progress, purpose: str, timeout_s: Optional[float] = None) -> Any:
    """Call `target(**arguments, progress=…)` in a fresh interpreter and return its result.

    Args:
        target: "module:function", importable with this process's `sys.path`.
        arguments: JSON values.
        progress: receives what the function reports to the `progress` it is given.
        purpose: begins the sentence of a crash, as "building with TensorRT".
        timeout_s: after which the child is killed; None waits as long as it takes.

    Returns:
        The function's result, a JSON value.

    Raises:
        DeployoptError: what the function raised, with its class.
        BuildFailed: the child crashed (names the signal), raised anything else, or took longer than `timeout_s`.
    """
    with _Child(target, arguments, timeout_s) as child:
        child.follow(progress)
    if child.failed:
        raise child.error(purpose, BuildFailed, progress)
    return child.result


def run_in_children(target: str, calls: Sequence[Mapping[str, Any]], progress: Progress, purpose: str) -> Any:
    """Make several calls of one function at once, each as `run_in_child` does, that work together: when one fails, the others are ended.

    Args:
        calls: the arguments of each. progress: receives what the first reports.
        purpose: begins the sentence of a crash, as "training in 2 processes".

    Returns:
        The first call's result, once all have ended.

    Raises:
        DeployoptError: what the one that failed first raised, with its class.
        StageFailed: one crashed (names the signal) or raised anything else.
    """
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(_Child(target, arguments)) for arguments in calls]
        first, *others = children
        watchers = [threading.Thread(target=_watch, args=(child, children, SilentProgress()), daemon=True) for child in others]
        for watcher in watchers:
            watcher.start()
        _watch(first, children, progress)  # in this thread: progress is shown by it, and Ctrl-C reaches it
        for watcher in watchers:
            watcher.join()
    failed = [child for child in children if child.failed]
    if failed:
        raise min(failed, key=_Child.distance_from_cause).error(purpose, StageFailed, progress)
    return first.result


def _watch(child: "_Child", children: Sequence["_Child"], progress: Progress) -> None:
    """Follow one of several children; if it fails, give the others a moment to say why they do, and end them."""
    child.follow(progress)
    if child.failed:
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        for other in children:
            other.kill_after(deadline - time.monotonic())


class _Child:
    """One call in a process of its own. A context manager; on leaving it the process is gone."""

    def __init__(self, target: str, arguments: Mapping[str, Any], timeout_s: Optional[float] = None) -> None:
        self._request = json.dumps({"target": target, "arguments": dict(arguments)})
        self._timeout_s = timeout_s
        self._last: Any = None
        self._killed = False
        self._overdue = False

    def __enter__(self) -> "_Child":
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            start_new_session=True,  # the terminal's Ctrl-C reaches the caller only, which then closes the child's input
        )
        return self

    def follow(self, progress: Progress) -> None:
        """Make the call, pass its progress on, and wait for its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._limited():
            with contextlib.suppress(BrokenPipeError):  # a child that died at once is explained by `error`
                self._process.stdin.write(self._request + "\n")
                self._process.stdin.flush()
            self._last = _relay(self._process.stdout, progress)
            self._ended = time.monotonic()
            if self._last is None:
                self._process.wait()

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        """Kill the process if this takes longer than its limit."""
        if self._timeout_s is None:
            yield
            return
        timer = threading.Timer(self._timeout_s, self._end_overdue)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end_overdue(self) -> None:
        self._overdue = True
        self._process.kill()

    def kill_after(self, seconds: float) -> None:
        """End the process if it does not end by itself."""
        try:
            self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self._killed = True
            self._process.kill()

    @property
    def failed(self) -> bool:
        return self._last is None or "error" in self._last

    @property
    def result(self) -> Any:
        return self._last["result"]

    def distance_from_cause(self) -> Tuple[int, float]:
        """Of several that failed: an error of ours says why, then a crash; a foreign error may be the loss of another, and who was killed says nothing."""
        if self._last is None:
            return 3 if self._killed else 1, self._ended
        return 2 if self._last["error"]["type"] is None else 0, self._ended

    def error(self, purpose: str, otherwise: Type[DeployoptError], progress: Progress) -> DeployoptError:
        """What the call raised; a crash and anything foreign, whose traceback is logged, as `otherwise`."""
        if self._last is None and self._overdue:
            return otherwise(f"{purpose}: not done within {(self._timeout_s or 0.0) / 60:g} min, and ended{self._said}", _OVERDUE)
        if self._last is None:
            return otherwise(f"{purpose}: the process {describe_exit(self._process.returncode)}{self._said}", _remedy(self._process.returncode))
        error = self._last["error"]
        if error["type"] is not None:
            return error_from_json(error, purpose)
        progress.log(self._last["traceback"])
        return otherwise(f"{purpose}: {error['message']}", _FOREIGN)

    def __exit__(self, *exc: Any) -> None:
        """Close the child's input, which asks it to stop, and kill it if it does not."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said = tail(self._stderr)
        self._stderr.close()


def _relay(lines: IO[str], progress: Progress) -> Any:
    """Pass the child's progress on; its closing message, or None if it ended without one."""
    with contextlib.ExitStack() as stack:
        bars: Dict[int, Bar] = {}
        closers: Dict[int, contextlib.ExitStack] = {}
        for line in lines:
            if not line.endswith("\n"):  # it died while writing
                return None
            message = json.loads(line)
            kind, key = message["kind"], message.get("bar", 0)
            if kind == "track":
                closers[key] = stack.enter_context(contextlib.ExitStack())
                bars[key] = closers[key].enter_context(progress.track(message["description"], message["total"]))
            elif kind == "advance":
                bars[key].advance(message["steps"], message["note"])
            elif kind == "done":
                closers[key].close()
            elif kind == "log":
                progress.log(message["text"])
            else:
                return message
    return None


def _remedy(returncode: int) -> str:
    if returncode == -signal.SIGKILL:
        return "SIGKILL is most often of the out-of-memory killer: free memory or choose smaller batch sizes, then run the same command again"
    return "native code crashed, of the runtime or of PyTorch: try another version of it; running the same command again tries once more"


class _Sender:
    """The child's `Progress`: everything becomes a message to the caller."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._bars = 0

    def send(self, kind: str, **content: Any) -> None:
        self._stream.write(json.dumps({"kind": kind, **content}) + "\n")
        self._stream.flush()

    def log(self, message: str) -> None:
        self.send("log", text=message)

    def track(self, description: str, total: Optional[float]) -> ContextManagerOfBar:
        return self._track(description, total)

    @contextlib.contextmanager
    def _track(self, description: str, total: Optional[float]) -> Iterator[Bar]:
        self._bars += 1
        key = self._bars
        self.send("track", bar=key, description=description, total=total)
        try:
            yield _SentBar(self, key)
        finally:
            self.send("done", bar=key)


class _SentBar:
    def __init__(self, sender: _Sender, key: int) -> None:
        self._sender, self._key = sender, key

    def advance(self, steps: float = 1, note: str = "") -> None:
        self._sender.send("advance", bar=self._key, steps=steps, note=note)


def _stop_when_input_closes() -> None:
    os.read(0, 1)  # not sys.stdin: its lock would be held by this thread at interpreter shutdown
    interrupt_main()
    time.sleep(GRACE_SECONDS)
    os._exit(130)


def _answer(sender: _Sender, request: Message) -> None:
    module, _, name = request["target"].partition(":")
    try:
        result = getattr(importlib.import_module(module), name)(progress=sender, **request["arguments"])
    except Exception as exc:
        sender.send("end", error=error_to_json(exc), traceback=None if isinstance(exc, DeployoptError) else traceback.format_exc())
    else:
        sender.send("end", result=result)


def main(arguments: List[str]) -> int:
    """The child: answer the one request on standard input."""
    if arguments:
        print("usage: python -m deployopt.runtime.child < request", file=sys.stderr)
        return 2
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what native code prints may not mix with the answers
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_stop_when_input_closes, daemon=True).start()
    try:
        _answer(_Sender(answers), request)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
