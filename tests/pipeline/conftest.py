"""Makes `cli_runs` and the writers of small data sets importable; one finished run of a tiny network for all tests."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from filelock import FileLock

for helpers in (Path(__file__).parent, Path(__file__).parents[1] / "data"):
    if str(helpers) not in sys.path:
        sys.path.append(str(helpers))

from cli_runs import TINY, Finished, run  # noqa: E402


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Finished:
    """Made once, by the worker that asks first."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent  # xdist's workers have their folders below a common one
    folder, cache = shared / "finished-run", shared / "finished-cache"
    with FileLock(shared / "finished.lock"):
        report = folder / "report.json"
        document = json.loads(report.read_text()) if report.exists() else run(recipe, folder, cache)
    return Finished(folder, cache, document)


@pytest.fixture
def cache(finished: Finished, tmp_path: Path) -> Path:
    """XDG_CACHE_HOME with a copy of what the finished run left."""
    return Path(shutil.copytree(finished.cache, tmp_path / "cache"))
