"""How long work tells how far it is. Whoever runs it decides how that looks; work itself only counts."""

from contextlib import contextmanager
from typing import ContextManager, Iterator, Optional, Protocol


class Bar(Protocol):
    """One piece of work under way."""

    def advance(self, steps: float = 1, note: str = "") -> None:
        """`steps` more are done; `note` replaces the short text beside the bar ("loss 0.31")."""


class Progress(Protocol):
    """Where work reports to."""

    def track(self, description: str, total: Optional[float]) -> "ContextManagerOfBar":
        """A bar over `total` steps, gone when the context ends. None: work that cannot tell how far it is; then only its time is shown."""

    def log(self, message: str) -> None:
        """One line worth keeping."""


ContextManagerOfBar = ContextManager[Bar]


class _SilentBar:
    def advance(self, steps: float = 1, note: str = "") -> None:
        pass


class SilentProgress:
    """Counts nothing and prints nothing: for tests and library use."""

    @contextmanager
    def _track(self) -> Iterator[Bar]:
        yield _SilentBar()

    def track(self, description: str, total: Optional[float]) -> "ContextManagerOfBar":
        return self._track()

    def log(self, message: str) -> None:
        pass
