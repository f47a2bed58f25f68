"""A session in a process of its own: native code may crash, run out of memory or hang there, and only that row fails.

The parent holds a `Worker`; the child runs `serve` and holds one session. Requests and answers are JSON headers with raw NumPy buffers
over a socket pair (no pickle). While idle the child blocks in `recv`. It dies with its parent: by end of file when idle, by
PR_SET_PDEATHSIG when busy. What it prints goes to a temporary file whose end is shown if it crashes.
"""

import ctypes
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, NoReturn, Optional, Sequence, Tuple

import numpy as np

from deployopt.errors import ArtifactMismatch, UsageError, WorkerDied
from deployopt.runtime import host, sampler
from deployopt.runtime.clock import now_ns, seconds_since
from deployopt.runtime.preprocessing import to_feed
from deployopt.runtime.process import describe_exit, error_from_json, error_to_json, leave, tail
from deployopt.runtime.sampler import Block, WarmUp
from deployopt.runtime.session import Explained, Feed, LayerTime, Loaded, Profiling, Session, SessionOptions, TensorSpec

_LENGTH = struct.Struct("!Q")
_PR_SET_PDEATHSIG = 1
Arrays = Mapping[str, np.ndarray]
Answer = Tuple[Dict[str, Any], Dict[str, np.ndarray]]

# The child's sys.path is the parent's, so that it finds the same deployopt (a zip included) and the same opener, and runs no user script.
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from deployopt.runtime.worker import serve; serve(int(sys.argv[2]), int(sys.argv[3]))"


class Opened(NamedTuple):
    """A session as the child opened it. `profiles`: its runtime can time layers."""

    inputs: Tuple[TensorSpec, ...]
    outputs: Tuple[TensorSpec, ...]
    provider: str
    load_ms: float
    streams: int
    profiles: bool


def _send(channel: socket.socket, content: Mapping[str, Any], arrays: Arrays) -> None:
    """One message: length, JSON, then the arrays' bytes in the order the JSON lists them."""
    layout = [[name, a.dtype.str, list(a.shape)] for name, a in arrays.items()]
    header = json.dumps({"content": content, "arrays": layout}).encode()
    channel.sendall(_LENGTH.pack(len(header)) + header)
    for array in arrays.values():
        channel.sendall(array.tobytes())


def _receive_exactly(channel: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = channel.recv_into(view)
        if got == 0:
            raise EOFError
        view = view[got:]
    return data


def _receive(channel: socket.socket) -> Answer:
    """The next message. Raises EOFError if the other side is gone."""
    (size,) = _LENGTH.unpack(_receive_exactly(channel, _LENGTH.size))
    header = json.loads(_receive_exactly(channel, size).decode())
    arrays = {}
    for name, dtype, shape in header["arrays"]:
        kind = np.dtype(dtype)
        raw = _receive_exactly(channel, kind.itemsize * int(np.prod(shape, dtype=np.int64)))
        arrays[name] = np.frombuffer(raw, kind).reshape(shape)
    return header["content"], arrays


class Memory(NamedTuple):
    """Bytes of a child: its largest resident set since the last `load`, and what it holds on GPUs now; each None where it cannot be read."""

    peak_bytes: Optional[int]
    device_bytes: Optional[int]


class Worker:
    """One session in a child process. A context manager; requests block until they are answered.

    Every request raises `WorkerDied` if the child crashed, was killed or did not answer within `timeout_s`; our own errors raised in the
    child come out with their type and remedy; foreign ones as `StageFailed`.

    Args:
        opener: "module:function", called in the child as `function(path, options)`; returns a `Session`.
        path: of the artifact.
        options: how to open it.
        timeout_s: for one request; the child counts as hanging after it.
    """

    def __init__(self, opener: str, path: Path, options: SessionOptions, timeout_s: float = 600.0) -> None:
        if ":" not in opener:
            raise UsageError(f"an opener is 'module:function', found '{opener}'")
        self._opener = opener
        self._path = path
        self._options = options
        self._timeout_s = timeout_s
        self._process: Optional[subprocess.Popen[bytes]] = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: Any, *exc: Any) -> None:
        if kind is not None:
            self.kill()  # an interrupted child may be in the middle of anything
        self.close()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def spawn(self) -> None:
        """Start the child, which then waits; from the main thread, for on Linux a child ends with the thread that started it."""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 -- lives as long as the child; close() closes it
        self._channel, theirs = socket.socketpair()
        self._channel.settimeout(self._timeout_s)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                start_new_session=True,  # the terminal's Ctrl-C is the parent's business
            )

    def start(self) -> Opened:
        """Open the session in the child, which is spawned if it is not; `load_ms` is the opening alone, imports excluded."""
        if self._process is None:
            self.spawn()
        content, _ = self._ask("open", opener=self._opener, path=str(self._path), options={**self._options._asdict(), "extra": dict(self._options.extra)})
        return Opened(_specs(content["inputs"]), _specs(content["outputs"]), content["provider"], content["load_ms"], content["streams"], content["profiles"])

    def load(self, images: np.ndarray) -> float:
        """Bind buffers of images, uint8 [buffers, n, H, W, C], for timing on every stream; milliseconds of the first inference at this shape.

        Also starts the measuring of peak memory anew.

        Raises:
            ArtifactMismatch: the model does not take such images.
        """
        content, _ = self._ask("load", {"images": images})
        return float(content["first_inference_ms"])

    def warm_up(self, min_seconds: float = 0.2, min_runs: int = 10, max_seconds: float = 2.0) -> WarmUp:
        content, _ = self._ask("warm_up", min_seconds=min_seconds, min_runs=min_runs, max_seconds=max_seconds)
        return WarmUp(**content)

    def block(self, iterations: int, first: int = 0, lead_in: int = 0) -> Block:
        """Time runs of the loaded buffers; see `sampler.time_streams`."""
        content, arrays = self._ask("block", iterations=iterations, first_index=first, lead_in=lead_in)
        return Block(arrays["host_ns"], arrays.get("device_ms"), **content)

    def profile(self, images: np.ndarray, runs: int) -> List[LayerTime]:
        """Time each layer on buffers of images, uint8 [buffers, n, H, W, C]; see `session.Profiling`.

        Raises:
            UsageError: the runtime cannot (`Opened.profiles`). ArtifactMismatch: the model does not take such images.
        """
        content, _ = self._ask("profile", {"images": images}, runs=runs)
        return [LayerTime(name, kind, tuple(nodes), precision, time_us, calls) for name, kind, nodes, precision, time_us, calls in content["layers"]]

    def infer(self, images: np.ndarray) -> Dict[str, np.ndarray]:
        """Outputs by name for images uint8 [n, H, W, C]."""
        return self._ask("infer", {"images": images})[1]

    def memory(self) -> Memory:
        content, _ = self._ask("memory")
        return Memory(**content)

    def execution(self) -> Dict[str, str]:
        """How the loaded buffers were executed; see `session.Explained`. {} where the runtime knows one way only."""
        content, _ = self._ask("execution")
        return dict(content)

    def kill(self) -> None:
        if self.alive:
            assert self._process is not None
            self._process.kill()

    def close(self, grace_s: float = 5.0) -> None:
        """Let the child close its session and end; kill it if it takes longer than `grace_s`."""
        if self._process is None:
            return
        self._channel.close()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()
        self._process = None

    def _ask(self, operation: str, arrays: Optional[Arrays] = None, **arguments: Any) -> Answer:
        if self._process is None:
            raise UsageError(f"the worker of {self._path.name} is not running", "call start() first, inside its with-block")
        doing = f"{_DOING[operation]} {self._path.name} in a child process"
        try:
            _send(self._channel, {"operation": operation, **arguments}, arrays or {})
            content, answer = _receive(self._channel)
        except socket.timeout:
            self._process.kill()
            self._process.wait()
            raise WorkerDied(f"{doing}: no answer within {self._timeout_s:g} s{tail(self._stderr)}", "the runtime hangs on this model") from None
        except (EOFError, BrokenPipeError, ConnectionResetError) as exc:
            code = self._process.wait()
            raise WorkerDied(f"{doing}: it {describe_exit(code)}{tail(self._stderr)}", _remedy(code)) from exc
        if "error" in content:
            raise error_from_json(content["error"], doing)
        return content, answer


_DOING = {
    "open": "opening",
    "load": "binding inputs of",
    "warm_up": "warming up",
    "block": "timing",
    "profile": "profiling",
    "infer": "running",
    "memory": "reading the memory of",
    "execution": "asking for the execution of",
}


def _remedy(returncode: int) -> str:
    if returncode == -signal.SIGKILL:
        return "SIGKILL is mostly the kernel's answer to memory running out: choose smaller batch sizes or free memory"
    return "native code of the runtime crashed: try another version of it, or leave this backend out"


def _specs(rows: Sequence[Sequence[Any]]) -> Tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in rows)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, also in the middle of native code."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


class _Service:
    """The child's session and what may be asked of it: a request's operation is the method's name."""

    def __init__(self) -> None:
        self._session: Optional[Session] = None
        self._loaded: List[Loaded] = []  # one a stream
        self._peak_since_load = False

    def open(self, arrays: Arrays, opener: str, path: str, options: Mapping[str, Any]) -> Answer:
        module, _, function = opener.partition(":")
        opening: Callable[[Path, SessionOptions], Session] = getattr(importlib.import_module(module), function)
        start = now_ns()
        session = opening(Path(path), SessionOptions(**options))
        load_ms = seconds_since(start) * 1e3
        self._session = session
        inputs, outputs = [list(s) for s in session.inputs], [list(s) for s in session.outputs]
        facts = {"provider": session.provider, "load_ms": load_ms, "streams": session.streams, "profiles": isinstance(session, Profiling)}
        return {"inputs": inputs, "outputs": outputs, **facts}, {}

    def load(self, arrays: Arrays) -> Answer:
        session = self._opened()
        self._loaded = []  # lets go of the last batch size's buffers before new ones are made
        self._peak_since_load = host.reset_peak_memory()
        feeds = [self._feed(images) for images in arrays["images"]]
        first_ms = sampler.time_once(lambda: session.infer(feeds[0]))  # before `load`, for which some sessions infer
        self._loaded = [session.load(feeds) for _ in range(session.streams)]
        return {"first_inference_ms": first_ms}, {}

    def warm_up(self, arrays: Arrays, **limits: Any) -> Answer:
        return sampler.warm_up_streams(self._bound(), **limits)._asdict(), {}

    def block(self, arrays: Arrays, **extent: int) -> Answer:
        timed = sampler.time_streams(self._bound(), **extent)
        answer = {"host_ns": timed.host_ns}
        if timed.device_ms is not None:
            answer["device_ms"] = timed.device_ms
        return {"wall_s": timed.wall_s, "process_cpu_s": timed.process_cpu_s, "core_clock_mhz": timed.core_clock_mhz}, answer

    def profile(self, arrays: Arrays, runs: int) -> Answer:
        session = self._opened()
        if not isinstance(session, Profiling):
            raise UsageError(f"sessions on {session.provider} do not time layers", "profile an ONNX file or an engine")
        return {"layers": session.profile([self._feed(images) for images in arrays["images"]], runs)}, {}

    def infer(self, arrays: Arrays) -> Answer:
        return {}, self._opened().infer(self._feed(arrays["images"]))

    def memory(self, arrays: Arrays) -> Answer:
        peak = host.peak_memory_bytes() if self._peak_since_load else None  # else it may be that of opening the session, or of a larger batch before
        return Memory(peak, host.device_memory_bytes())._asdict(), {}

    def execution(self, arrays: Arrays) -> Answer:
        loaded = self._bound()[0]
        return loaded.execution() if isinstance(loaded, Explained) else {}, {}

    def close(self) -> None:
        self._loaded = []
        if self._session is not None:
            self._session.close()

    def _opened(self) -> Session:
        if self._session is None:
            raise UsageError("no session is open in this worker", "call start() first")
        return self._session

    def _bound(self) -> Sequence[Loaded]:
        if not self._loaded:
            raise UsageError("no inputs are bound in this worker", "call load() first")
        return self._loaded

    def _feed(self, images: np.ndarray) -> Feed:
        """Images uint8 [n, H, W, C] as the model's only input."""
        specs = self._opened().inputs
        if len(specs) != 1:
            raise ArtifactMismatch(f"wanted a model with one input, found {len(specs)}: {', '.join(s.name for s in specs)}")
        (spec,) = specs
        if spec.dtype == "uint8":  # a graph that normalises by itself
            feed = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        elif spec.dtype in ("float16", "float32", "float64"):
            feed = to_feed(images).astype(spec.dtype, copy=False)
        else:
            raise ArtifactMismatch(f"input '{spec.name}' takes {spec.dtype}; images are given as floats in 0–1, or as uint8")
        fits = len(spec.shape) == 4 and all(isinstance(want, str) or want == feed.shape[axis] for axis, want in enumerate(spec.shape))
        if not fits:
            raise ArtifactMismatch(
                f"input '{spec.name}' takes {list(spec.shape)}, found images of {list(feed.shape)} [N, C, H, W]",
                "give images of the model's size; a model without a dynamic batch axis runs only the batch it was exported with",
            )
        return {spec.name: feed}


def serve(descriptor: int, parent: int) -> NoReturn:
    """The child's main loop: answer requests on the inherited socket until it is closed. Then the process ends."""
    _die_with(parent)
    service = _Service()
    with socket.socket(fileno=descriptor) as channel:
        while True:
            try:
                request, arrays = _receive(channel)
            except EOFError:
                break
            try:
                content, answer = getattr(service, request.pop("operation"))(arrays, **request)
            except Exception as exc:
                traceback.print_exc()
                content, answer = {"error": error_to_json(exc)}, {}
            _send(channel, content, answer)
    service.close()
    leave(0)
