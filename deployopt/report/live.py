"""Progress of a run: a live stage list on a terminal, plain log lines elsewhere. Always on stderr: results own stdout."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from deployopt.report import units
from deployopt.report.summary import split_remedy
from deployopt.runtime.progress import Bar, ContextManagerOfBar

LINE_EVERY_S = 10.0  # off a terminal, a bar logs this often
FINISHED_SHOWN = 8
PENDING_SHOWN = 4
MARKS = {"pending": ("·", "dim"), "running": ("▸", "bold cyan"), "done": ("✓", "green"), "cached": ("✓", "green"), "unavailable": ("○", "yellow")}
FAILED_MARK = ("✗", "bold red")


@dataclass
class _Step:
    id: str
    title: str
    state: str = "pending"
    seconds: float | None = None
    reason: str = ""

    def line(self) -> Text:
        mark, style = MARKS.get(self.state, FAILED_MARK)
        text = Text(f"{mark} ", style=style, no_wrap=True, overflow="ellipsis")
        text.append(self.title, style="dim" if self.state == "pending" else "")
        return text.append(f"  {self.note}", style=style) if self.note else text

    @property
    def note(self) -> str:
        """What is said beside the title."""
        if self.state in {"pending", "running"}:
            return ""
        if self.state == "done":
            return units.seconds(self.seconds)
        return f"{self.state}: {self.reason}" if self.reason else self.state


class _LiveBar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, steps: float = 1, note: str = "") -> None:
        self._progress.update(self._task, advance=steps)
        if note:
            self._progress.update(self._task, note=note)


class _LogBar:
    """Says how far it is, at most once in `LINE_EVERY_S`."""

    def __init__(self, console: Console, description: str, total: float) -> None:
        self._console, self._description, self._total = console, description, total
        self._done, self._started = 0.0, time.monotonic()
        self._said = self._started

    def advance(self, steps: float = 1, note: str = "") -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._said < LINE_EVERY_S or self._done >= self._total:
            return
        self._said = now
        left = (now - self._started) * (self._total - self._done) / self._done if self._done > 0 else None
        parts = [f"{100 * self._done / self._total:.0f} %" if self._total else "", f"about {units.seconds(left)} left" if left is not None else "", note]
        _plain(self._console, f"  {self._description}: {', '.join(p for p in parts if p)}")


class _QuietBar:
    def advance(self, steps: float = 1, note: str = "") -> None:
        pass


def _plain(console: Console, message: str) -> None:
    console.print(Text(f"{time.strftime('%H:%M:%S')} {message}"), soft_wrap=True)


class LiveProgress:
    """A `runtime.progress.Progress` that also knows the run's steps. Use as a context manager.

    Args:
        console: on stderr.
        steps: (id, title) of every planned step, in order.
        quiet: say nothing but failures.
    """

    def __init__(self, console: Console, steps: Sequence[tuple[str, str]], quiet: bool = False) -> None:
        self._console, self._quiet = console, quiet
        self._steps = {step_id: _Step(step_id, title) for step_id, title in steps}
        self._bars = Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
        )
        live = console.is_terminal and not console.is_dumb_terminal and not quiet
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=8, redirect_stdout=False, transient=True) if live else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Restore the terminal, also after an exception or Ctrl-C; what finished stays as plain lines."""
        if self._live:
            self._live.stop()
            for step in self._steps.values():
                if step.state not in {"pending", "running"}:
                    self._console.print(step.line())

    def _render(self) -> RenderableType:
        """At most about 20 lines however many steps there are: earlier finished and later pending ones are counted."""
        steps = list(self._steps.values())
        finished = [s for s in steps if s.state not in {"pending", "running"}]
        running = [s for s in steps if s.state == "running"]
        pending = [s for s in steps if s.state == "pending"]
        lines: list[RenderableType] = []
        folded = finished[: max(0, len(finished) - FINISHED_SHOWN)]
        if folded:
            seconds = sum(s.seconds or 0.0 for s in folded)
            lines.append(Text(f"✓ {units.plural(len(folded), 'earlier step')}, {units.seconds(seconds)}", style="green"))
        lines += [s.line() for s in finished[len(folded) :]]
        lines += [s.line() for s in running]
        if self._bars.tasks:
            lines.append(self._bars.get_renderable())
        lines += [s.line() for s in pending[:PENDING_SHOWN]]
        if len(pending) > PENDING_SHOWN:
            lines.append(Text(f"· {len(pending) - PENDING_SHOWN} more", style="dim"))
        return Group(*lines)

    def step_started(self, step_id: str, title: str) -> None:
        """A step begins to run; one that was not planned is added to the list."""
        step = self._steps.setdefault(step_id, _Step(step_id, title))
        step.title, step.state = title, "running"
        if not self._live and not self._quiet:
            _plain(self._console, f"{title}: started")

    def step_finished(self, step_id: str, seconds: float, cached: bool, status: str, reason: str | None = None) -> None:
        """A step ended.

        Args:
            seconds: it took now.
            cached: it was read back, not run.
            status: "ok", or any other of a report's step states ("unavailable", "failed").
            reason: for a status other than "ok".
        """
        step = self._steps.setdefault(step_id, _Step(step_id, step_id))
        step.state = status if status not in {"ok", "done"} else "cached" if cached else "done"
        step.seconds, step.reason = seconds, split_remedy(reason)[0] if reason else ""
        failed = step.state not in MARKS
        if not self._live and (failed or not self._quiet):
            _plain(self._console, f"{step.title}: {step.note}")

    def log(self, message: str) -> None:
        """One line worth keeping, above the live list."""
        if self._quiet:
            return
        if self._live:
            self._console.print(Text(message), soft_wrap=True)
        else:
            _plain(self._console, message)

    def track(self, description: str, total: float) -> ContextManagerOfBar:
        return self._track(description, total)

    @contextmanager
    def _track(self, description: str, total: float) -> Iterator[Bar]:
        if self._quiet:
            yield _QuietBar()
        elif self._live:
            task = self._bars.add_task(description, total=total, note="")
            try:
                yield _LiveBar(self._bars, task)
            finally:
                self._bars.remove_task(task)
        else:
            yield _LogBar(self._console, description, total)
