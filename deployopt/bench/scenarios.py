"""How inferences are asked for: MLPerf Inference's single-stream and offline scenarios, each with so many CPU threads.

A scenario is measured as one `harness.Group`: its sessions are opened with its streams and threads, compared with each other, and closed.
Source: MLPerf Inference: Arm et al., https://arxiv.org/abs/1911.02549, table II.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from deployopt.runtime.session import SessionOptions

ScenarioName = Literal["single_stream", "offline"]


@dataclass(frozen=True)
class Scenario:
    """One way of asking.

    Attributes:
        name: "single_stream": one query after the other, whose latency is the figure (MLPerf's is p90, from 64 queries on). "offline": everything is
            there at once, and throughput is the figure; each CPU thread is a stream that has its own inference in flight.
        threads: CPU threads of all streams together.
        sweep: what sets it apart from the run's own single stream in a row's key: "", "t1", "offline", "offline-t1".
    """

    name: ScenarioName
    threads: int
    sweep: str = ""

    @property
    def streams(self) -> int:
        return self.threads if self.name == "offline" else 1

    def options(self, options: SessionOptions) -> SessionOptions:
        """How a session is opened for it; runtimes with one stream only give that one all the threads."""
        return options._replace(threads=self.threads // self.streams, streams=self.streams)


def scenarios(names: Iterable[ScenarioName], threads: int, others: Iterable[int] = ()) -> list[Scenario]:
    """Every scenario on the run's own threads, then on each other number of them; the run's own single stream comes first."""
    ordered = sorted(names, key=lambda name: name != "single_stream")
    counts = [threads, *(n for n in others if n != threads)]
    return [Scenario(name, n, _sweep(name, None if n == threads else n)) for n in counts for name in ordered]


def _sweep(name: ScenarioName, threads: int | None) -> str:
    parts = ["offline"] if name == "offline" else []
    return "-".join(parts if threads is None else [*parts, f"t{threads}"])
