"""`kill -9` at any moment: the next run goes on from the last finished step and ends with the same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_runs import Finished, cached, logged, run, start, wait_for, weights

LESS = ("--set", "stages.build.backends=[onnxruntime]", "--set", "stages.benchmark.accuracy=false")  # the models do not depend on it


@pytest.mark.slow  # a run killed at three points
def test_killed_at_any_moment_a_run_goes_on_and_ends_with_the_same_weights(recipe: Path, finished: Finished, tmp_path: Path) -> None:
    folder, cache = tmp_path / "run", tmp_path / "cache"
    for step in ("02-qat", "03-export-qat", "05-benchmark"):
        done_before = finished_steps(folder)
        with start(recipe, folder, cache, *LESS) as process:
            wait_for(logged(folder / "log.txt", f"{step}: started"), process)
            time.sleep(4 if step == "05-benchmark" else 0)  # long enough for sessions to be open
            process.send_signal(signal.SIGKILL)
        assert step not in finished_steps(folder), "it was killed too late to show anything"
        log = (folder / "log.txt").read_text().splitlines()
        assert not any(f"{s}: not cached" in line for line in log[len_of_previous(log) :] for s in done_before), "a finished step ran again"
    document = run(recipe, folder, cache, *LESS)
    assert {"init", "00-finetune", "01-prune", "02-qat"} <= cached(document)
    assert weights(folder) == weights(finished.folder)
    assert not list((cache / "deployopt" / "steps").glob("*.partial"))


@pytest.mark.parametrize("written", [".owner.json", "recipe.yaml", "environment.json"])
def test_killed_while_it_writes_its_first_files_a_run_can_be_continued(recipe: Path, tmp_path: Path, written: str) -> None:
    folder, cache, options = tmp_path / "run", tmp_path / "cache", ("--until", "init", "--threads", "1")
    die_there = (
        "import os, signal, sys\n"
        "replace = os.replace\n"
        f"os.replace = lambda old, new: os.kill(os.getpid(), signal.SIGKILL) if new.endswith('/{written}') else replace(old, new)\n"
        "from deployopt.cli import main\n"
        "main()"
    )
    command = [sys.executable, "-c", die_there, "run", str(recipe), "--run-dir", str(folder), *options]
    killed = subprocess.run(command, env={**os.environ, "XDG_CACHE_HOME": str(cache)}, timeout=100, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [p for p in folder.iterdir() if p.suffix == ".tmp"], "it was not killed while it wrote"
    assert [step["status"] for step in run(recipe, folder, cache, *options)["steps"]] == ["ok"]
    assert not [p for p in folder.iterdir() if p.suffix == ".tmp"]


def finished_steps(folder: Path) -> set[str]:
    return {p.parent.name for p in folder.glob("*/DONE")}


def len_of_previous(log: list[str]) -> int:
    """Lines of earlier processes: the last process begins where `init` is named last."""
    return max(i for i, line in enumerate(log) if " init: started" in line)


TIMED_CHOICE = ("--set", "stages.prune.round_to=auto", "--until", "prune")


@pytest.mark.slow  # times all candidates
def test_killed_after_a_timed_choice_a_run_keeps_to_the_choice(recipe: Path, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    with start(recipe, folder, cache, *TIMED_CHOICE) as process:
        wait_for(lambda: bool(choices(cache)), process)
        process.send_signal(signal.SIGKILL)
    assert not (folder / "01-prune" / "DONE").exists(), "it was killed too late to show anything"
    (chosen,) = choices(cache)
    before = medians(chosen)  # timing never repeats to the last digit, and may choose differently
    resumed = run(recipe, folder, cache, *TIMED_CHOICE)
    assert "01-prune" not in cached(resumed)
    (reported,) = (v["record"]["pruning"]["alignment"] for v in resumed["variants"] if v["name"] == "prune")
    assert reported["p50_ms"] == before == medians(chosen), "the choice was made anew"


def choices(cache: Path) -> list[Path]:
    return list((cache / "deployopt" / "choices").glob("*.json"))


def medians(stored: Path) -> dict[str, float]:
    """Candidate → milliseconds, of the prune step's alignment."""
    found: dict[str, float] = json.loads(stored.read_text())["alignment"]["p50_ms"]
    return found
