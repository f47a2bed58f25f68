"""The names of NVIDIA's Python API that are called, held to the modules that are installed; `benchmarks/tensorrt_names.py` does so on a device."""

import ast
import importlib
import inspect
import sys
from types import ModuleType

import pytest

from deployopt.errors import BackendUnavailable
from deployopt.runtime.tensorrt_vendor import load_vendor
from deployopt.runtime.tensorrt_versions import is_weakly_typed

# of Python, NumPy and ours, where the vendor's module has the same ones
ELSEWHERE = {"__name__", "__version__", "append", "float16", "float32", "int64", "itemsize", "kind", "message", "nbytes", "pop", "size", "value", "write"}
ELSEWHERE |= {"tactic_sources"}  # of our options


@pytest.fixture(scope="module")
def names(repository):
    sys.path.append(str(repository / "benchmarks"))
    return importlib.import_module("tensorrt_names")


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'deployopt[tensorrt-rtx]'")


def test_rtx_has_every_name(names, rtx):
    assert names.lacking(rtx) == []


def test_tensorrt_has_every_name(names):
    try:
        trt = load_vendor("tensorrt")
    except BackendUnavailable as exc:
        pytest.skip(exc.message)
    assert names.lacking(trt) == []


def test_a_name_that_is_called_and_not_listed_would_be_found(names, rtx, repository):
    sources = [*(repository / "deployopt" / "runtime").glob("tensorrt*.py"), repository / "benchmarks" / "_gpu_sessions.py"]
    called = {node.attr for path in sources for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    theirs = {name for kind in vars(rtx).values() if inspect.isclass(kind) for name in dir(kind) if not hasattr(object, name)} | set(vars(rtx))
    listed = {part for name in names.wanted(rtx) for part in name.split(".")}
    assert len(called & theirs) > 60
    assert (called & theirs) - listed - set(names.WEAKLY_TYPED["ParserError"]) - ELSEWHERE == set()


@pytest.mark.parametrize(("version", "more", "fewer"), [("8.5.2", "", "ILayer.metadata"), ("8.6.1", "ILayer.metadata", "IProgressMonitor")])
def test_each_version_is_asked_for_what_it_is_called_for(names, version, more, fewer):
    module = ModuleType("tensorrt")
    module.__version__ = version
    asked = names.wanted(module)
    assert is_weakly_typed(module)
    assert not more or more in asked
    assert fewer not in asked
    assert {"Builder", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"} <= set(names.lacking(module))
