"""Makes the helpers of tests/runtime importable, here and in workers' children, which take over this process's sys.path; one tiny model."""

import sys
from pathlib import Path

import pytest

HELPERS = str(Path(__file__).parents[1] / "runtime")
if HELPERS not in sys.path:
    sys.path.append(HELPERS)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    import tiny_onnx

    return tiny_onnx.convolution(tmp_path / "tiny.onnx")
