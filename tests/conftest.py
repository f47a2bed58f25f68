"""Shared fixtures. Every test gets a cache of its own, so none sees another's (or the user's) finished steps."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # helpers that several rooms' tests share, as stored_runs
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background: children would inherit that, and tests interrupt some
    signal.signal(signal.SIGINT, signal.default_int_handler)
REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first (xdist keeps the order with --no-loadscope-reorder): none of them is left for one worker at the end. One file makes the
    finished run that others read; they come when it is there, so that no worker waits for it."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    readers = sorted({item.path for item in items if "finished" in getattr(item, "fixturenames", ())})

    def rank(item: pytest.Item) -> int:
        if item.path in readers:
            return 0 if item.path == readers[0] else 2
        return 1 if item.path in slow else 3

    items.sort(key=rank)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home / "deployopt"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout: recipes, README and packaging are tested too."""
    return REPOSITORY
