"""An ONNX Runtime session that is slower by a share: after each inference it spins for that share of its time. Opened in a worker's child."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deployopt.backends import onnxruntime
from deployopt.runtime.clock import now_ns
from deployopt.runtime.session import Loaded, SessionOptions

OPENER = f"{__name__}:open_slowed"


class _SlowedLoaded:
    def __init__(self, loaded: Loaded, share: float) -> None:
        self._loaded, self._share = loaded, share

    def __len__(self) -> int:
        return len(self._loaded)

    def run(self, index: int) -> None:
        start = now_ns()
        self._loaded.run(index)
        finished = now_ns()
        until = finished + round(self._share * (finished - start))
        while now_ns() < until:
            pass

    def device_ms(self) -> float | None:
        return None


class _Slowed:
    """The session itself, but for what it binds for timing."""

    def __init__(self, session: Any, share: float) -> None:
        self._session, self._share = session, share

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def load(self, feeds: Any) -> _SlowedLoaded:
        return _SlowedLoaded(self._session.load(feeds), self._share)


def open_slowed(path: Path, options: SessionOptions) -> _Slowed:
    """`options.extra["slowdown"]`: the share, 0.05 for 5 %."""
    extra = dict(options.extra)
    share = float(extra.pop("slowdown"))
    return _Slowed(onnxruntime.open(path, options._replace(extra=extra)), share)
