"""One call in a spawned process: native code may crash there without taking the run along.

The child gets one JSON request on its standard input and answers with JSON lines. Its input stays open while the caller wants the
result: when it closes (Ctrl-C in the caller, or the caller died) the call is interrupted, and a second later ended whatever it does.
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
from typing import IO, Any, Dict, Iterator, List, Mapping

from deployopt.errors import BuildFailed, DeployoptError
from deployopt.runtime.process import describe_exit, error_from_json, error_to_json, tail
from deployopt.runtime.progress import Bar, ContextManagerOfBar, Progress

GRACE_SECONDS = 1.0
Message = Dict[str, Any]


def run_in_child(target: str, arguments: Mapping[str, Any], progress: Progress, purpose: str) -> Any:
    """Call `target(**arguments, progress=…)` in a fresh interpreter and return its result.

    Args:
        target: "module:function", importable with this process's `sys.path`.
        arguments: JSON values.
        progress: receives what the function reports to the `progress` it is given.
        purpose: begins the sentence of a crash, as "building with TensorRT".

    Returns:
        The function's result, a JSON value.

    Raises:
        DeployoptError: what the function raised, with its class.
        BuildFailed: the child crashed (names the signal) or raised anything else.
    """
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            start_new_session=True,  # the terminal's Ctrl-C reaches the caller only, which then closes the child's input
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # a child that died at once is explained below
                process.stdin.write(json.dumps({"target": target, "arguments": dict(arguments)}) + "\n")
                process.stdin.flush()
            last = _relay(process.stdout, progress)
            if last is None:
                process.wait()
        finally:
            _end(process)
        if last is None:
            raise BuildFailed(f"{purpose}: the process {describe_exit(process.returncode)}{tail(stderr)}", _remedy(process.returncode))
    if "error" in last:
        raise _rebuild(last["error"], purpose)
    return last["result"]


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


def _end(process: "subprocess.Popen[str]") -> None:
    """Close the child's input, which asks it to stop, and kill it if it does not."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def _remedy(returncode: int) -> str:
    if returncode == -signal.SIGKILL:
        return "SIGKILL is most often the kernel's out-of-memory killer: free memory or build smaller batch sizes, then run the same command again"
    return "a crash of the vendor's library: try another version of it; running the same command again tries once more"


def _rebuild(error: Message, purpose: str) -> DeployoptError:
    """What the child raised; anything foreign is a failed build."""
    return BuildFailed(f"{purpose}: {error['message']}") if error["type"] is None else error_from_json(error, purpose)


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

    def track(self, description: str, total: float) -> ContextManagerOfBar:
        return self._track(description, total)

    @contextlib.contextmanager
    def _track(self, description: str, total: float) -> Iterator[Bar]:
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
        if not isinstance(exc, DeployoptError):
            traceback.print_exc()
        sender.send("end", error=error_to_json(exc))
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
    sys.exit(main(sys.argv[1:]))
