"""runtime/ and errors.py also run on devices whose Python is 3.8."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "deployopt"
ON_DEVICES = [PACKAGE / "errors.py", *sorted((PACKAGE / "runtime").glob("*.py"))]


@pytest.mark.parametrize("path", ON_DEVICES, ids=lambda path: path.name)
def test_the_syntax_is_that_of_python_3_8(path: Path) -> None:
    assert ast.parse(path.read_text(), path.name, feature_version=(3, 8)).body


def test_newer_syntax_would_be_found() -> None:
    with pytest.raises(SyntaxError):
        ast.parse("match x:\n    case 1: pass", feature_version=(3, 8))
