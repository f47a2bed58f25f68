"""`deployopt compare` and `deployopt history` as CI meets them: files, exit codes, and nothing heavy loaded."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import stored_runs
import typer

from deployopt.cli import app

HEAVY = ("torch", "torchvision", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "sklearn", "scipy", "PIL")


def deployopt(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "deployopt", *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return stored_runs.write(tmp_path / "base", 1.0)


def test_a_regression_is_exit_code_1_and_told_in_every_file(tmp_path: Path, base: Path) -> None:
    slow = stored_runs.write(tmp_path / "slow", 1.2)
    files = {name: tmp_path / name for name in ("c.md", "c.xml", "h.jsonl")}
    options = ["--max-latency-regression", "5%", "--markdown", files["c.md"], "--junit", files["c.xml"], "--history", files["h.jsonl"]]
    done = deployopt("compare", base, slow, "--json", *options)
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout)
    assert result["rows"][0]["regressions"] == ["latency"]
    assert "❌" in files["c.md"].read_text()
    suite = ElementTree.fromstring(files["c.xml"].read_text()).find("testsuite")
    assert suite is not None
    assert suite.get("failures") == "1"
    assert json.loads(files["h.jsonl"].read_text())["rows"][stored_runs.KEY]["p50_ms"] == 1.2
    assert deployopt("compare", base, slow, "--max-latency-regression", "30%").returncode == 0


def test_compare_loads_nothing_heavy(tmp_path: Path, base: Path) -> None:
    new = stored_runs.write(tmp_path / "new", 1.0)
    code = (
        "import sys; sys.argv = ['deployopt', *sys.argv[1:]]\n"
        "from deployopt.cli import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        f"print('loaded:', sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    arguments = ["compare", base, new, "--max-latency-regression", "5%", "--history", tmp_path / "h.jsonl", "--markdown", tmp_path / "c.md"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip().splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("", 4, "is empty"),
        ('{"schema": 1, "rows": [', 4, "is not whole JSON"),
        ('{"schema": 2, "deployopt": "9.0", "variants": [], "rows": []}', 4, "wanted report schema 1, found schema 2 (written by deployopt 9.0)"),
        ("[]", 4, "not a report"),
        ('{"schema": 1, "recipe": {"name": "other"}, "variants": [], "rows": []}', 2, "wanted two runs of one recipe, found 'tiny' and 'other'"),
        (None, 2, "wanted a run folder or a report.json"),
    ],
)
def test_what_is_no_comparable_report_is_named(tmp_path: Path, base: Path, text: str | None, code: int, said: str) -> None:
    other = tmp_path / "report.json"
    if text is not None:
        other.write_text(text)
    done = deployopt("compare", base, other)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lifetimes", "4", "--data", "digits"], "--lifetimes, --data would do nothing"),
        (["--rerun", "--data", "digit"], "did you mean 'digits'"),
        (["--rerun", "--seconds", "inf"], "--seconds: wanted a number of seconds, found inf"),
        (["--rerun", "--precision", "1 ms"], "--precision"),
    ],
)
def test_options_of_a_rerun_are_refused_where_they_mean_nothing(base: Path, options: list[str], said: str) -> None:
    done = deployopt("compare", base, base, *options)
    assert done.returncode == 2
    assert said in done.stderr


def test_history_shows_what_compare_appended(tmp_path: Path, base: Path) -> None:
    history = tmp_path / "h.jsonl"
    for name, p50 in (("one", 1.0), ("two", 1.1)):
        assert deployopt("compare", base, stored_runs.write(tmp_path / name, p50), "--history", history).returncode == 0
    done = deployopt("history", history)
    assert done.returncode == 0, done.stderr
    assert "2 runs on CPU A" in done.stdout
    assert "+10.0 %" in done.stdout
    assert deployopt("history", history, "--format", "html", "-o", tmp_path / "h.html").returncode == 0
    assert "<svg" in (tmp_path / "h.html").read_text()
    assert deployopt("history", tmp_path / "none.jsonl").returncode == 2


def test_commands_of_the_documentation_are_taken(repository: Path) -> None:
    group = typer.main.get_command(app)
    block = (repository / "docs" / "compare.md").read_text().partition("```bash\n")[2].partition("```")[0]
    shown = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    assert {name for name, *_ in shown} == {"compare", "history"}
    for name, *arguments in shown:
        group.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]  # raises on an unknown option or a missing argument
