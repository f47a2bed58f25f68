import io

import pytest
from rich.console import Console

from deployopt.report import live
from deployopt.report.live import LiveProgress

STEPS = [(f"{i:02d}", f"step {i}") for i in range(20)]


def plain_console() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=100, force_terminal=False), stream


def test_off_a_terminal_each_step_is_two_lines() -> None:
    console, stream = plain_console()
    with LiveProgress(console, STEPS) as progress:
        progress.step_started("00", "fine-tune")
        with progress.track("epochs", 3) as bar:
            for _ in range(3):
                bar.advance(note="loss 0.3")
        progress.step_finished("00", 1.25, cached=False, status="ok")
        progress.step_finished("01", 0.0, cached=True, status="ok")
        progress.step_finished("02", 0.0, cached=False, status="unavailable", reason="no driver\n  → install it")
    lines = [line[9:] for line in stream.getvalue().splitlines()]
    assert lines == ["fine-tune: started", "fine-tune: 1.2 s", "step 1: cached", "step 2: unavailable: no driver"]
    assert "\x1b" not in stream.getvalue()


def test_a_bar_logs_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    console, stream = plain_console()
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(live.time, "monotonic", lambda: float(next(clock)))
    with LiveProgress(console, STEPS) as progress, progress.track("epochs", 10) as bar:
        for _ in range(10):
            bar.advance()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3  # 40 s at one line in 10 s; the last step needs none
    assert "30 %, about 28.0 s left" in lines[0]


def test_quiet_says_only_failures() -> None:
    console, stream = plain_console()
    with LiveProgress(console, STEPS, quiet=True) as progress:
        progress.log("hello")
        progress.step_started("00", "fine-tune")
        progress.step_finished("00", 1.0, cached=False, status="failed", reason="the loss became NaN")
    assert stream.getvalue().splitlines()[0].endswith("fine-tune: failed: the loss became NaN")
    assert len(stream.getvalue().splitlines()) == 1


def test_many_steps_stay_compact_and_an_exception_restores_the_terminal() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=100, height=50, force_terminal=True)

    def fail() -> None:
        with LiveProgress(console, STEPS) as progress:
            for step_id, title in STEPS[:12]:
                progress.step_started(step_id, title)
                progress.step_finished(step_id, 1.0, cached=False, status="ok")
            progress.step_started("12", "[build] of 12")
            with progress.track("calibrating", 10) as bar:
                bar.advance(4, note="batch 4")
                drawn = io.StringIO()
                Console(file=drawn, width=100).print(progress._render())
                lines = drawn.getvalue().splitlines()
                assert len(lines) <= live.FINISHED_SHOWN + live.PENDING_SHOWN + 4
                assert any("4 earlier steps" in line for line in lines)
                assert any("[build] of 12" in line for line in lines)
                assert any("calibrating" in line and "40%" in line for line in lines)
                raise RuntimeError("stage broke")

    with pytest.raises(RuntimeError, match="stage broke"):
        fail()
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")  # the cursor is shown again
    assert "step 11" in stream.getvalue()
