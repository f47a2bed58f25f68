"""Makes the helpers of tests/runtime importable, here and in workers' children, which take over this process's sys.path."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

HELPERS = str(Path(__file__).parents[1] / "runtime")
if HELPERS not in sys.path:
    sys.path.append(HELPERS)


@pytest.fixture
def old() -> ModuleType:
    """A module that has TensorRT 8.6's names and builds nothing."""
    spec = importlib.util.spec_from_file_location("tensorrt", Path(__file__).parent / "faulty" / "tensorrt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
