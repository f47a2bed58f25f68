"""The one interface through which anything is inferred, scored or timed. Standard library + NumPy, Python 3.8 syntax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Mapping, NamedTuple, Optional, Protocol, Sequence, Tuple, Union, runtime_checkable

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray
else:
    Array = Any  # naming a type is no reason to load NumPy


Feed = Mapping[str, Array]
Dim = Union[int, str]


class TensorSpec(NamedTuple):
    """Name, shape and dtype of an input or output. A dynamic axis is its name ("batch"); dtype is NumPy's name ("float32")."""

    name: str
    shape: Tuple[Dim, ...]
    dtype: str


class SessionOptions(NamedTuple):
    """How a session is opened.

    `threads` counts CPU threads of one stream; `device` is "cpu" or "cuda:N"; `streams` is how many inferences are to run at once.
    """

    threads: int = 1
    device: str = "cpu"
    precision: str = "fp32"
    extra: Mapping[str, Any] = {}
    streams: int = 1


class LayerTime(NamedTuple):
    """What one layer of an executed graph takes.

    Attributes:
        name, kind: as the runtime names it.
        nodes: the ONNX nodes it stands for, by name (a nameless one by its first output); () for what the runtime added, as a change of layout.
        precision: that it computes in ("int8", "fp32" …), in the runtime's own word where we have none.
        time_us: of one inference, in microseconds: the median of several, or with OpenVINO, whose counters only average, their mean.
        calls: in one inference.
    """

    name: str
    kind: str
    nodes: Tuple[str, ...]
    precision: str
    time_us: float
    calls: int = 1


class Loaded(Protocol):
    """Feeds bound to a session, ready to be timed."""

    def __len__(self) -> int:
        """Number of feeds that are rotated."""

    def run(self, index: int) -> None:
        """One inference of feed `index % len(self)`: request in → result in host memory. Nothing else."""

    def device_ms(self) -> Optional[float]:
        """Device time of the last run in milliseconds without copies, or None where the runtime has no such clock."""


@runtime_checkable
class Explained(Protocol):
    """A `Loaded` whose runtime may execute it in one way or another."""

    def execution(self) -> Dict[str, str]:
        """How it was executed so far, for the row's contract: {"cuda_graph": "off", "on" or "refused: why"}, {"waiting_threads": "spin", "block" or
        "spin, then block"}; nothing of threads where one inference has only one. {"shape_specialization": "eager"} of TensorRT-RTX. {"int8_kernels":
        "exact, since …"} where slower ones than usual were chosen."""


class Session(Protocol):
    """An artifact opened by a runtime. A context manager; not thread-safe.

    Attributes:
        inputs, outputs: specs in the artifact's order.
        provider: what really executes, as the runtime names it ("CPU", "CUDAExecutionProvider").
        streams: so many `Loaded`s may run at once, each in a thread of its own: as many as were asked for, or 1 where the runtime has one stream
            only, which then has the threads of all.
    """

    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    provider: str
    streams: int

    def infer(self, feed: Feed) -> Dict[str, Array]:
        """Outputs by name. The arrays belong to the caller: a later call does not overwrite them."""

    def load(self, feeds: Sequence[Feed]) -> Loaded:
        """Bind feeds (all of one shape) for timing over rotated inputs."""

    def close(self) -> None: ...

    def __enter__(self) -> "Session": ...

    def __exit__(self, *exc: Any) -> None: ...


@runtime_checkable
class Profiling(Protocol):
    """A `Session` whose runtime can time its layers."""

    def profile(self, feeds: Sequence[Feed], runs: int) -> List[LayerTime]:
        """Each executed layer's time over `runs` inferences, after a few that do not count, of feeds of one shape in rotation; in the order of execution.

        Profiling slows inference down, so it happens in a native session of its own, opened with profiling on and closed again: what `infer` and
        `load` use is left as it is.
        """
