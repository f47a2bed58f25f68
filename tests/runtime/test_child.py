import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from deployopt.errors import ArtifactMismatch, BuildFailed, StageFailed
from deployopt.runtime.child import run_in_child, run_in_children
from deployopt.runtime.progress import SilentProgress

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def targets_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


class Recorder(SilentProgress):
    """Keeps what was reported; `on_advance` may raise."""

    def __init__(self, on_advance=lambda: None):
        self.seen = []
        self.on_advance = on_advance

    def log(self, message):
        self.seen.append(("log", message))

    @contextmanager
    def track(self, description, total):
        self.seen.append(("track", description, total))
        yield self
        self.seen.append(("done", description))

    def advance(self, steps=1, note=""):
        self.seen.append(("advance", steps, note))
        self.on_advance()


def wait_until_gone(pid):
    for _ in range(100):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":  # dead, only not yet reaped by its new parent
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_result_and_progress_come_back():
    progress = Recorder()
    assert run_in_child("child_targets:double", {"value": 21}, progress, "doubling") == {"value": 42}
    assert progress.seen == [("log", "working"), ("track", "doubling", 2), ("advance", 1, "half"), ("advance", 1, ""), ("done", "doubling")]


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGKILL"])
def test_crash_names_the_signal_and_the_last_words(name):
    with pytest.raises(BuildFailed, match=rf"building a thing: the process was ended by {name}\n  last words") as caught:
        run_in_child("child_targets:crash", {"number": getattr(signal, name)}, SilentProgress(), "building a thing")
    assert ("out-of-memory" in caught.value.remedy) == (name == "SIGKILL")


def test_exit_without_an_answer():
    with pytest.raises(BuildFailed, match="ended with exit code 3"):
        run_in_child("child_targets:exit_at_once", {}, SilentProgress(), "building")


def test_our_errors_keep_class_and_remedy():
    with pytest.raises(ArtifactMismatch) as caught:
        run_in_child("child_targets:mismatch", {}, SilentProgress(), "building")
    assert (caught.value.message, caught.value.remedy) == ("wanted 1, found 2", "build it again")


def test_foreign_errors_become_build_failures():
    progress = Recorder()
    with pytest.raises(BuildFailed, match="building: LookupError: nothing there") as caught:
        run_in_child("child_targets:foreign", {}, progress, "building")
    ((kind, logged),) = progress.seen
    assert kind == "log"
    assert "in foreign\n" in logged
    assert caught.value.remedy is not None
    assert "log" in caught.value.remedy


def test_several_calls_work_together_and_the_first_counts(tmp_path):
    progress = Recorder()
    calls = [{"rank": rank, "folder": str(tmp_path)} for rank in (0, 1)]
    assert run_in_children("child_targets:meet", calls, progress, "meeting") == 0
    assert progress.seen == [("track", "rank 0", 1), ("advance", 1, ""), ("done", "rank 0")]


@pytest.mark.parametrize(("how", "error", "said"), [("mismatch", ArtifactMismatch, "wanted 1"), ("crash", StageFailed, "working: .*was ended by SIGSEGV")])
def test_when_one_of_several_fails_the_others_are_ended(tmp_path, how, error, said):
    calls = [{"rank": rank, "folder": str(tmp_path), "how": how} for rank in (0, 1)]
    start = time.monotonic()
    with pytest.raises(error, match=said):
        run_in_children("child_targets:second_fails", calls, SilentProgress(), "working")
    assert time.monotonic() - start < 30
    assert all(wait_until_gone(int((tmp_path / f"{rank}.pid").read_text())) for rank in (0, 1))


def test_interrupt_ends_the_child_within_its_grace(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_in_child("child_targets:tell_and_sleep", {"pid_file": str(tmp_path / "pid")}, Recorder(interrupt), "sleeping")
    assert wait_until_gone(int((tmp_path / "pid").read_text()))
    assert time.monotonic() - start < 10


def test_child_ends_when_its_caller_is_killed(tmp_path):
    pid_file = tmp_path / "pid"
    code = (
        "from deployopt.runtime.child import run_in_child; from deployopt.runtime.progress import SilentProgress; "
        f"run_in_child('child_targets:tell_and_sleep', {{'pid_file': {str(pid_file)!r}}}, SilentProgress(), 'sleeping')"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)})
    try:
        for _ in range(200):
            if pid_file.exists() and pid_file.read_text():
                break
            time.sleep(0.05)
    finally:
        caller.kill()
        caller.wait()
    assert wait_until_gone(int(pid_file.read_text()))
