"""Names of a recipe are found among our modules and third parties' entry points."""

import subprocess
import sys
from pathlib import Path

import pytest
from distributions import install

from deployopt import plugins
from deployopt.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution whose entry point is the stage `distill`."""
    entry_points = "[deployopt.stages]\ndistill = teacher.distill\n\n[deployopt.models]\ntiny = teacher.nets:Tiny\n"
    install(tmp_path, "teacher", entry_points, {"distill": "version = 3\n", "nets": "class Tiny: ...\n"})
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_names_are_modules_without_private_ones() -> None:
    assert "digits" in plugins.names("data")
    assert "classification" in plugins.names("tasks")
    assert not any(name.startswith("_") for kind in ("stages", "backends", "data", "tasks") for name in plugins.names(kind))


def test_find_imports_our_module() -> None:
    assert plugins.find("tasks", "classification").__name__ == "deployopt.tasks.classification"


def test_find_loads_a_third_partys_entry_point(third_party: Path) -> None:
    assert "distill" in plugins.names("stages")
    assert plugins.names("models") == ["tiny"]
    assert plugins.find("stages", "distill").version == 3
    assert plugins.find("models", "tiny").__name__ == "Tiny"


@pytest.mark.parametrize(("kind", "what"), [("data", "data set"), ("tasks", "task"), ("stages", "stage"), ("backends", "backend"), ("models", "model")])
def test_unknown_name_says_what_there_is(kind: plugins.Kind, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        plugins.find(kind, "digitz")
    assert caught.value.exit_code == 2
    assert caught.value.message.startswith(f"unknown {what} 'digitz'")
    assert all(name in caught.value.message for name in plugins.names(kind))


def test_unknown_suggests_the_nearest() -> None:
    assert plugins.unknown("stage", "qta", ["prune", "qat"]) == "unknown stage 'qta'; did you mean 'qat'? (available: prune, qat)"
    assert plugins.unknown("stage", "zzz", ["prune", "qat"]) == "unknown stage 'zzz' (available: prune, qat)"
    assert plugins.unknown("row", "qat/torch/fp32/b1", []) == "unknown row 'qat/torch/fp32/b1' (available: none)"


def test_listing_imports_no_plugin() -> None:
    code = """
import sys
from deployopt import plugins
plugins.names("data"), plugins.names("tasks")
print([m for m in sys.modules if (m.startswith("deployopt.data.") and "._" not in m) or m == "torch"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
