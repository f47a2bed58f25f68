"""The actions and workflows in .github: the action's steps, and those of the gate that ask GitHub, run here as they stand, with a stub in place of `gh`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import stored_runs
from ruamel.yaml import YAML

EXPRESSION = re.compile(r"\$\{\{\s*(.+?)\s*\}\}")


def document(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text())


@pytest.fixture(scope="module")
def action(request: pytest.FixtureRequest) -> Any:
    return document(request.config.rootpath / ".github/actions/compare/action.yml")


DEPLOYOPT = f'exec "{sys.executable}" -m deployopt "$@"'
GH = 'if [ "$1" = api ]; then exec jq -r "$5" artifacts.json; fi\necho "$@" >> asked'


def put(tool: Path, script: str) -> None:
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


class Runner:
    """What GitHub gives a composite action's shell steps: inputs through `env`, its files, and `deployopt` on the path."""

    def __init__(self, action: Any, folder: Path, **inputs: str) -> None:
        self.steps = {step["name"]: step for step in action["runs"]["steps"]}
        self.inputs = {name: inputs.get(name.replace("-", "_"), declared.get("default")) for name, declared in action["inputs"].items()}
        self.folder = folder
        tools = folder / "bin"
        tools.mkdir()
        put(tools / "deployopt", DEPLOYOPT)
        self.files = {name: folder / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        self.path = f"{tools}:{os.environ['PATH']}"

    def run(self, name: str) -> subprocess.CompletedProcess[str]:
        step = self.steps[name]
        given = {key: EXPRESSION.sub(lambda found: self.inputs[found[1].removeprefix("inputs.")], value) for key, value in step["env"].items()}
        environment = {**os.environ, "PATH": self.path, **{k: str(v) for k, v in self.files.items()}, **given}
        shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c"]  # as GitHub's `shell: bash`
        return subprocess.run([*shell, step["run"]], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(("new_ms", "code", "said"), [(1.0, 0, "✅"), (1.3, 1, "❌")])
def test_the_actions_steps_judge_two_runs(tmp_path: Path, action: Any, new_ms: float, code: int, said: str) -> None:
    stored_runs.write(tmp_path / "base", 1.0)
    stored_runs.write(tmp_path / "new", new_ms)
    runner = Runner(action, tmp_path, base="base", new="new", max_size_regression="1%", history="history.jsonl")
    done = runner.run("Compare")
    assert done.returncode == code, done.stderr
    assert runner.run("Job summary").returncode == 0
    output = tmp_path / "deployopt-compare"
    assert sorted(p.name for p in output.iterdir()) == ["comment.md", "comparison.json", "history.html", "history.md", "junit.xml"]
    assert said in runner.files["GITHUB_STEP_SUMMARY"].read_text()
    assert "deployopt history" in runner.files["GITHUB_STEP_SUMMARY"].read_text()
    assert runner.files["GITHUB_OUTPUT"].read_text() == "comment=deployopt-compare/comment.md\n"
    gate = json.loads((output / "comparison.json").read_text())["gate"]
    assert (gate["max_latency_regression"], gate["max_accuracy_drop"], gate["max_size_regression"], gate["max_memory_regression"]) == (0.05, 0.5, 0.01, None)


def test_an_error_leaves_a_summary_step_that_passes(tmp_path: Path, action: Any) -> None:
    runner = Runner(action, tmp_path, base="absent", new="absent")
    done = runner.run("Compare")
    assert done.returncode == 2
    assert "wanted a run folder" in done.stderr
    assert runner.run("Job summary").returncode == 0


def test_the_action_installs_this_checkout(repository: Path, action: Any) -> None:
    package = next(step for step in action["runs"]["steps"] if step["name"] == "Install deployopt")["env"]["PACKAGE"]
    folder = package.replace("${{ github.action_path }}", str(repository / ".github/actions/compare"))
    assert (Path(folder) / "pyproject.toml").resolve() == repository / "pyproject.toml"


class GitHub:
    """What the gate's steps get on GitHub, in run 20: `deployopt`, and `gh`, which answers from `artifacts.json` as the real one does, by jq, and writes
    down what else it is asked."""

    def __init__(self, folder: Path, repository: Path, artifacts: list[dict[str, Any]]) -> None:
        self.folder, self.steps = folder, {step.get("name"): step for step in _steps(document(repository / ".github/workflows/gate.yml"))}
        (folder / "artifacts.json").write_text(json.dumps({"artifacts": artifacts}))
        (folder / "bin").mkdir()
        put(folder / "bin/gh", GH)
        put(folder / "bin/deployopt", DEPLOYOPT)
        self.files = {name: folder / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}

    def run(self, name: str, **given: str) -> None:
        environment = {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "GITHUB_REPOSITORY": "us/project", "GITHUB_RUN_ID": "20", **given}
        environment |= {key: str(path) for key, path in self.files.items()}
        shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c"]
        subprocess.run([*shell, self.steps[name]["run"]], cwd=self.folder, env=environment, timeout=60, check=True)

    def asked(self) -> str:
        return (self.folder / "asked").read_text() if (self.folder / "asked").exists() else ""


def artifact(run: int, *, branch: str = "main", repository: int = 1, expired: bool = False) -> dict[str, Any]:
    """As GitHub's REST API lists it, of a run of a repository whose id is 1."""
    return {"expired": expired, "workflow_run": {"id": run, "repository_id": 1, "head_repository_id": repository, "head_branch": branch}}


NEEDS_JQ = pytest.mark.skipif(shutil.which("jq") is None, reason="the stub of gh filters by jq")
FETCH = "Fetch the baseline and the history"


def download(run: int, name: str, folder: str) -> str:
    return f"run download {run} --repo us/project --name {name} --dir {folder}\n"


@NEEDS_JQ
def test_the_baseline_is_the_newest_of_our_own_default_branch(tmp_path: Path, repository: Path) -> None:
    found = [artifact(20), artifact(9, branch="feature"), artifact(8, repository=2), artifact(7, expired=True), artifact(6), artifact(5)]
    github = GitHub(tmp_path, repository, found)
    github.run(FETCH, BRANCH="main", NAME="deployopt-run", GITHUB_EVENT_NAME="pull_request")
    history = download(6, "deployopt-run-history", "deployopt-runs")
    assert github.asked() == download(6, "deployopt-run", "deployopt-runs/base") + history
    assert github.files["GITHUB_OUTPUT"].read_text() == "found=true\n"


@NEEDS_JQ
def test_a_run_of_the_default_branch_continues_the_history_of_the_one_before(tmp_path: Path, repository: Path) -> None:
    github = GitHub(tmp_path, repository, [artifact(20), artifact(6)])
    github.run(FETCH, BRANCH="main", NAME="deployopt-run", GITHUB_EVENT_NAME="push")
    assert github.asked() == download(6, "deployopt-run-history", "deployopt-runs")
    assert not github.files["GITHUB_OUTPUT"].exists()


@NEEDS_JQ
def test_without_a_baseline_nothing_is_compared_and_the_summary_says_so(tmp_path: Path, repository: Path) -> None:
    github = GitHub(tmp_path, repository, [artifact(8, repository=2)])
    github.run(FETCH, BRANCH="main", NAME="deployopt-run", GITHUB_EVENT_NAME="pull_request")
    assert github.asked() == ""
    assert not github.files["GITHUB_OUTPUT"].exists()
    assert "no run named deployopt-run on main yet" in github.files["GITHUB_STEP_SUMMARY"].read_text()


def test_github_that_does_not_answer_fails_the_step(tmp_path: Path, repository: Path) -> None:
    """A history taken for a first one would lose every line before it."""
    github = GitHub(tmp_path, repository, [])
    put(tmp_path / "bin/gh", "exit 1")
    for event in ("pull_request", "push"):
        with pytest.raises(subprocess.CalledProcessError):
            github.run(FETCH, BRANCH="main", NAME="deployopt-run", GITHUB_EVENT_NAME=event)


def test_the_history_grows_by_a_line_a_run_and_its_trend_is_shown(tmp_path: Path, repository: Path) -> None:
    github = GitHub(tmp_path, repository, [])
    github.run("Show the history")  # on the first pull request there is none
    assert not github.files["GITHUB_STEP_SUMMARY"].exists()
    folder = tmp_path / "deployopt-runs"
    for p50_ms in (1.0, 1.3):
        shutil.rmtree(folder / "new", ignore_errors=True)
        stored_runs.write(folder / "new", p50_ms)
        github.run("Add to the history")
    github.run("Show the history")
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [line["rows"][stored_runs.KEY]["p50_ms"] for line in lines] == [1.0, 1.3]
    assert "2 runs on CPU A" in github.files["GITHUB_STEP_SUMMARY"].read_text()
    assert "+30.0 %" in github.files["GITHUB_STEP_SUMMARY"].read_text()
    kept = github.steps["Keep the history"]["with"]
    assert kept["path"].split() == ["deployopt-runs/history.jsonl", "deployopt-runs/history.html"]
    assert all((tmp_path / name).is_file() for name in kept["path"].split())
    assert kept["name"] == "${{ inputs.run-artifact }}-history"


def test_only_runs_of_the_default_branch_write_the_history(repository: Path) -> None:
    """One after the other, or two would continue the same file and one line would be lost."""
    (gate,) = document(repository / ".github/workflows/gate.yml")["jobs"].values()
    steps = {step.get("name"): step for step in gate["steps"]}
    assert steps["Add to the history"]["if"] == "${{ success() && github.ref == format('refs/heads/{0}', github.event.repository.default_branch) }}"
    assert steps["Keep the history"]["if"] == "${{ !cancelled() && steps.history.outcome == 'success' }}"
    assert gate["concurrency"] == {"group": "gate-${{ inputs.run-artifact }}-${{ github.ref }}"}


def test_a_comment_is_made_of_what_was_compared(tmp_path: Path, repository: Path) -> None:
    github = GitHub(tmp_path, repository, [])
    github.run("Comment on the pull request", PULL_REQUEST="3", COMMENT="comment.md")
    assert github.asked() == ""
    (tmp_path / "comment.md").write_text("met")
    github.run("Comment on the pull request", PULL_REQUEST="3", COMMENT="comment.md")
    assert github.asked() == "pr comment 3 --repo us/project --body-file comment.md --edit-last --create-if-none\n"


def test_runs_of_the_default_branch_are_not_cancelled(repository: Path) -> None:
    for path in (repository / ".github/workflows").glob("performance*.yml"):
        assert document(path)["concurrency"].get("cancel-in-progress", False) in (False, "${{ github.event_name == 'pull_request' }}")


def test_shell_steps_take_no_expressions(repository: Path) -> None:
    """What a pull request may choose (a branch's name) would run as a command."""
    steps = [step for path in (repository / ".github").rglob("*.yml") for step in _steps(document(path))]
    assert len(steps) > 8
    assert [step["run"] for step in steps if "run" in step and "${{" in step["run"]] == []


def _steps(content: Any) -> list[Any]:
    jobs = [content["runs"]] if "runs" in content else content["jobs"].values()
    return [step for job in jobs for step in job.get("steps", [])]


def test_the_checks_run_as_everywhere_on_pushes_and_pull_requests(repository: Path) -> None:
    checks = document(repository / ".github/workflows/checks.yml")
    assert set(checks["on"]) == {"push", "pull_request"}
    script = repository / _steps(checks)[-1]["run"]
    assert os.access(script, os.X_OK)
    assert {"make lint types layers docker", "make test"} <= set(re.findall(r"^time (make .*)$", script.read_text(), re.MULTILINE))


def test_actions_are_pinned_alike_everywhere(repository: Path) -> None:
    used = {step["uses"] for path in (repository / ".github").rglob("*.yml") for step in _steps(document(path)) if "uses" in step}
    foreign = [name for name in used if not name.startswith("./")]
    assert all("@" in name for name in foreign)
    assert len({name.partition("@")[0] for name in foreign}) == len(foreign)


def test_workflows_give_what_is_declared(repository: Path, action: Any) -> None:
    folder = repository / ".github/workflows"
    gate = document(folder / "gate.yml")
    declared = gate["on"]["workflow_call"]["inputs"]
    callers = [job for path in folder.glob("performance*.yml") for job in document(path)["jobs"].values()]
    assert [job["uses"] for job in callers] == ["./.github/workflows/gate.yml"] * 2
    assert all(set(job.get("with", {})) <= declared.keys() for job in callers)
    (compare,) = [step for step in _steps(gate) if step.get("uses") == "./.github/actions/compare"]
    assert set(compare["with"]) <= action["inputs"].keys()
    required = {name for name, entry in action["inputs"].items() if entry.get("required")}
    assert required <= set(compare["with"])
    used = set(re.findall(r"inputs\.([\w-]+)", (folder / "gate.yml").read_text()))
    assert used == set(declared)
    assert json.loads(declared["runner"]["default"]) == "ubuntu-latest"
    assert (repository / declared["recipe"]["default"]).is_file()
