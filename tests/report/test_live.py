import io
import time

import pytest
from rich.console import Console

from deployopt.report import live
from deployopt.report.live import LiveProgress

STEPS = [(f"{i:02d}", f"step {i}") for i in range(20)]
STAGES = [("init", "init"), *((f"{i:02d}-export", f"export v{i}") for i in range(3)), *((f"{i:02d}-build", f"build v{i}") for i in range(24))]


def plain_console() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=100, force_terminal=False), stream


def said(stream: io.StringIO) -> list[str]:
    """Log lines without their time."""
    return [line[9:] for line in stream.getvalue().splitlines()]


def test_off_a_terminal_each_step_is_one_line_and_what_fell_short_is_told_at_the_end() -> None:
    console, stream = plain_console()
    with LiveProgress(console, STEPS) as progress:
        progress.step_started("00", "fine-tune")
        with progress.track("epochs", 3) as bar:
            for _ in range(3):
                bar.advance(note="loss 0.3")
        progress.step_finished("00", 1.25, cached=False, status="ok")
        for i, reason in ((1, "no driver\n  → install it"), (2, "no driver"), (3, "no kernels")):
            progress.step_started(f"{i:02d}", f"build v{i}")
            progress.step_finished(f"{i:02d}", 0.0, cached=False, status="unavailable", reason=reason)
        progress.step_finished("04", 0.0, cached=True, status="ok")
    assert said(stream) == ["fine-tune: 1.2 s", "step 4: cached", "build: 2 unavailable (v1, v2): no driver", "build: 1 unavailable (v3): no kernels"]
    assert "\x1b" not in stream.getvalue()


def test_off_a_terminal_a_long_step_says_that_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "STARTED_AFTER_S", 0.05)
    console, stream = plain_console()
    with LiveProgress(console, STEPS) as progress:
        progress.step_started("00", "fine-tune")
        time.sleep(0.3)
        progress.step_finished("00", 0.3, cached=False, status="ok")
        progress.step_started("01", "export")
        progress.step_finished("01", 0.0, cached=False, status="ok")
    time.sleep(0.1)
    assert said(stream) == ["fine-tune: started", "fine-tune: 0.3 s", "export: 0.0 s"]


def test_a_bar_logs_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    console, stream = plain_console()
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(live.time, "monotonic", lambda: float(next(clock)))
    with LiveProgress(console, STEPS) as progress, progress.track("epochs", 10) as bar:
        for _ in range(10):
            bar.advance()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3  # 40 s at one line in 10 s; the last step needs none
    assert "30 %, about 28 s left" in lines[0]


def test_work_that_cannot_tell_how_far_it_is_says_how_long_it_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LINE_EVERY_S", 0.05)
    console, stream = plain_console()
    with LiveProgress(console, STEPS) as progress, progress.track("torch.onnx", None):
        time.sleep(0.3)
    lines = said(stream)
    assert lines
    assert all(line.startswith("  torch.onnx: ") and line.endswith(" so far") for line in lines)
    time.sleep(0.15)
    assert said(stream) == lines
    terminal = Console(file=io.StringIO(), width=100, height=24, force_terminal=True)
    with LiveProgress(terminal, STEPS) as progress, progress.track("torch.onnx", None):
        (line,) = [line for line in drawn(progress, 24) if "torch.onnx" in line]
        assert "%" not in line
        assert "0.0 s" in line


def test_quiet_says_only_failures() -> None:
    console, stream = plain_console()
    with LiveProgress(console, STEPS, quiet=True) as progress:
        progress.log("hello")
        progress.step_started("00", "fine-tune")
        progress.step_finished("00", 1.0, cached=False, status="failed", reason="the loss became NaN")
    assert stream.getvalue().splitlines()[0].endswith("fine-tune: failed: the loss became NaN")
    assert len(stream.getvalue().splitlines()) == 1


def drawn(progress: LiveProgress, height: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=100, height=height).print(progress._render())
    return stream.getvalue().splitlines()


def test_steps_of_a_stage_share_a_line_and_an_exception_restores_the_terminal() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=100, height=24, force_terminal=True)

    def fail() -> None:
        with LiveProgress(console, STAGES) as progress:
            for step_id, title in STAGES[:12]:
                progress.step_started(step_id, title)
                progress.step_finished(step_id, 1.0, cached=False, status="ok" if step_id != "01-build" else "unavailable", reason=None)
            progress.step_started("08-build", "build [v8]")
            with progress.track("calibrating", 10) as bar:
                bar.advance(4, note="batch 4")
                lines = drawn(progress, 24)
                assert [line.split("  ")[0] for line in lines] == ["✓ init", "✓ export 3/3", "▸ build 8/24", ""]
                assert "[v8], 8.0 s, about 1 s left, 1 unavailable" in lines[2]
                assert "calibrating" in lines[3]
                raise RuntimeError("stage broke")

    with pytest.raises(RuntimeError, match="stage broke"):
        fail()
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")  # the cursor is shown again
    assert "export 3/3" in stream.getvalue()


@pytest.mark.parametrize("height", [8, 12, 24])
@pytest.mark.parametrize("running", [0, 15, 29])
def test_the_list_never_exceeds_the_terminal(height: int, running: int) -> None:
    stages = [(f"{i:02d}", f"stage{i}") for i in range(30)]
    with LiveProgress(Console(file=io.StringIO(), width=100, height=height, force_terminal=True), stages) as progress:
        for step_id, title in stages[:running]:
            progress.step_started(step_id, title)
            progress.step_finished(step_id, 1.0, cached=False, status="ok")
        progress.step_started(*stages[running])
        with progress.track("epochs", 10):
            lines = drawn(progress, height)
    assert len(lines) < height
    assert any(f"stage{running}" in line for line in lines)
    assert any("epochs" in line for line in lines)
    assert any("later stage" in line for line in lines) == (running < 29)


def test_the_time_left_is_told_of_the_running_step_and_of_the_run_while_all_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    expected = {"init": 0.0, **{f"{i:02d}-export": 10.0 for i in range(3)}, **{f"{i:02d}-build": 1.0 for i in range(24)}}
    console = Console(file=io.StringIO(), width=100, height=24, force_terminal=True)
    with LiveProgress(console, STAGES, expected=expected) as progress:
        assert drawn(progress, 24)[-1].strip() == "about 54 s left"
        progress.step_finished("init", 0.0, cached=True, status="ok")
        progress.step_started("00-export", "export v0")
        clock[0] += 4
        lines = drawn(progress, 24)
        assert lines[1].endswith("v0, about 6 s left")
        assert lines[-1].strip() == "about 50 s left"
        clock[0] += 20  # longer than expected: what follows is still ahead
        assert drawn(progress, 24)[-1].strip() == "about 44 s left"
    with LiveProgress(console, STAGES, expected={**expected, "07-build": None}) as progress:
        progress.step_started("00-export", "export v0")
        lines = drawn(progress, 24)
        assert lines[1].endswith("v0, about 10 s left")
        assert len(lines) == 3


def test_what_was_never_run_is_taken_to_last_as_long_as_its_stages_others() -> None:
    console = Console(file=io.StringIO(), width=100, height=24, force_terminal=True)
    with LiveProgress(console, STAGES) as progress:
        for (step_id, title), seconds in zip(STAGES[1:3], (20.0, 40.0), strict=True):
            progress.step_started(step_id, title)
            progress.step_finished(step_id, seconds, cached=False, status="ok")
        progress.step_started(*STAGES[3])
        assert drawn(progress, 24)[1].endswith("about 30 s left")
        progress.step_finished(STAGES[3][0], 30.0, cached=False, status="ok")
        progress.step_started(*STAGES[4])
        assert "left" not in drawn(progress, 24)[2]  # the first of its stage
