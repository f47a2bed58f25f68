"""The calls of NVIDIA's Python API against its types: mypy over `deployopt/runtime/tensorrt*.py`, and what times
engines beside it, `benchmarks/_gpu_sessions.py`, with the package tensorrt-stubs (TensorRT 10.13)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import deployopt

PACKAGE = Path(deployopt.__file__).parent
# The stubs are generated and not quite Python: (what stands there, what was meant)
MENDS = (
    (r"\bin: ", "in_: "),  # a parameter may not be called so
    (r"channel_axis: int\)", "channel_axis: int = ...)"),  # behind parameters with defaults
    (r"(?m)^bool: DataType.*$", ""),  # hides the builtin bool of all signatures
)
SETTINGS = """
[mypy]
strict = True
warn_unused_ignores = False
warn_return_any = False
ignore_missing_imports = True
follow_imports = silent
[mypy-deployopt.runtime.session]
# its arrays are NumPy's, whose types take mypy half a minute; `make types` checks them
follow_imports = skip
[mypy-_gpu_sessions]
# torch's are not looked at
disallow_subclassing_any = False
"""
WRONG = """
from deployopt.runtime.tensorrt_api import Vendor

def wrong(trt: Vendor) -> None:
    builder = trt.Builder("no logger")
    builder.build_serialised_network()
    builder.create_network(flags="none")
    profile = builder.create_optimization_profile()
    profile.set_shape("input", (1, 3, 8, 8))
"""

pytestmark = pytest.mark.skipif(sys.version_info[:2] < (3, 11), reason="mypy is set up for 3.11")


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    """A folder with the stubs, mended where they are not Python."""
    found = [Path(p) for p in sys.path if (Path(p) / "tensorrt_bindings" / "tensorrt.pyi").exists()]
    if not found:
        pytest.skip("tensorrt-stubs is not installed")
    folder = tmp_path_factory.mktemp("stubs")
    for stub in ("tensorrt/__init__.pyi", "tensorrt_bindings/__init__.pyi", "tensorrt_bindings/tensorrt.pyi"):
        text = (found[0] / stub).read_text()
        for wrong, meant in MENDS:
            text = re.sub(wrong, meant, text)
        (folder / stub).parent.mkdir(exist_ok=True)
        (folder / stub).write_text(text)
    return folder


@pytest.fixture(scope="module")
def complaints(stubs, repository):
    """mypy's lines on our files, by file name."""
    (stubs / "wrong.py").write_text(WRONG)
    (stubs / "mypy.ini").write_text(SETTINGS)
    benchmarks = repository / "benchmarks"
    ours = [*sorted(str(path) for path in (PACKAGE / "runtime").glob("tensorrt*.py")), str(benchmarks / "_gpu_sessions.py")]
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "--no-site-packages", "wrong.py", *ours]
    told = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=stubs, env={"MYPYPATH": f"{stubs}:{PACKAGE.parent}:{benchmarks}"}, timeout=300
    )
    assert told.stderr == ""
    lines = [line for line in told.stdout.splitlines() if ": error: " in line]
    return {name: [line for line in lines if f"{name}:" in line] for name in ("wrong.py", *(Path(path).name for path in ours))}


def test_every_call_has_the_types_of_the_stubs(complaints):
    ours = {name: lines for name, lines in complaints.items() if name != "wrong.py"}
    assert len(ours) >= 9
    assert {name: lines for name, lines in ours.items() if lines} == {}


def test_a_wrong_call_would_be_found(complaints):
    found = "\n".join(complaints["wrong.py"])
    assert 'Argument 1 to "Builder" has incompatible type "str"; expected "ILogger"' in found
    assert '"Builder" has no attribute "build_serialised_network"' in found
    assert 'Argument "flags" to "create_network" of "Builder" has incompatible type "str"' in found
    assert 'Missing positional arguments "opt", "max" in call to "set_shape"' in found
