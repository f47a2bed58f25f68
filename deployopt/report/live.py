"""Progress of a run: a live stage list on a terminal, plain log lines elsewhere. Always on stderr: results own stdout."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, Task, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from deployopt.report import units
from deployopt.report.summary import split_remedy
from deployopt.runtime.progress import Bar, ContextManagerOfBar

LINE_EVERY_S = 10.0  # off a terminal, a bar logs this often
STARTED_AFTER_S = 2.0  # off a terminal, a step that takes longer says that it started
MARGIN = 2  # lines of a terminal that the list leaves free
MARKS = {
    "pending": ("·", "dim"),
    "running": ("▸", "bold cyan"),
    "done": ("✓", "green"),
    "cached": ("✓", "green"),
    "built": ("✓", "green"),
    "unavailable": ("○", "yellow"),
}
FAILED_MARK = ("✗", "bold red")


@dataclass
class _Step:
    id: str
    title: str
    expected: float | None = None
    state: str = "pending"
    seconds: float = 0.0
    reason: str = ""
    started: float = 0.0

    @property
    def stage(self) -> str:
        """The stage instance: a title is its name, and what it makes of it."""
        return self.title.partition(" ")[0]

    @property
    def label(self) -> str:
        return self.title.partition(" ")[2]

    @property
    def over(self) -> bool:
        return self.state not in {"pending", "running"}

    @property
    def failed(self) -> bool:
        return self.over and self.state not in MARKS

    @property
    def left(self) -> float | None:
        """Seconds it should still take; None if nothing like it was ever run, 0 when it takes longer than that."""
        if self.expected is None or self.over:
            return None if self.expected is None else 0.0
        return max(0.0, self.expected - (time.monotonic() - self.started)) if self.state == "running" else self.expected

    @property
    def note(self) -> str:
        """What became of it."""
        if self.state == "done":
            return units.seconds(self.seconds)
        return f"{self.state}: {self.reason}" if self.reason else self.state


def _held_back(steps: Iterable[_Step]) -> list[str]:
    """Steps that ended short of a measurable result, one line a stage, state and reason: "build: 2 unavailable (a, b): no driver"."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for step in steps:
        if step.over and not step.failed and step.reason:
            groups.setdefault((step.stage, step.state, step.reason), []).append(step.label)
    lines = []
    for (stage, state, reason), labels in groups.items():
        which = ", ".join(label for label in labels if label)
        lines.append(f"{stage}: {len(labels)} {state}{f' ({which})' if which else ''}: {reason}")
    return lines


def _stage_line(steps: Sequence[_Step]) -> Text:
    """One line for all steps of a stage: how many are done, what runs, how long it took, how the rest ended."""
    over, running = [s for s in steps if s.over], next((s for s in steps if s.state == "running"), None)
    failed = next((s for s in steps if s.failed), None)
    state = failed.state if failed else "running" if running or 0 < len(over) < len(steps) else "done" if over else "pending"
    if not failed and over and all(s.state == "unavailable" for s in steps):
        state = "unavailable"
    mark, style = MARKS.get(state, FAILED_MARK)
    text = Text(f"{mark} ", style=style, no_wrap=True, overflow="ellipsis")
    text.append(steps[0].stage, style="dim" if state == "pending" else "")
    if len(steps) > 1:
        text.append(f" {len(over)}/{len(steps)}", style="dim" if state == "pending" else "")
    said = [running.label if running else "", units.seconds(sum(s.seconds for s in over)) if over else ""]
    if running and running.left:
        said.append(units.time_left(running.left))
    counts = Counter(s.state for s in over if s.state != "done")
    said += [f"{number} {name}" if len(steps) > 1 else name for name, number in counts.items()]
    if failed:
        said.append(f"{failed.label or failed.stage}: {failed.reason}")
    return text.append(f"  {', '.join(part for part in said if part)}", style=style) if any(said) else text


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
        parts = [f"{100 * self._done / self._total:.0f} %" if self._total else "", units.time_left(left) if left is not None else "", note]
        _plain(self._console, f"  {self._description}: {', '.join(p for p in parts if p)}")


class _WaitingLogBar:
    """For work that cannot tell how far it is: says every `LINE_EVERY_S` for how long it has been going on."""

    def __init__(self, console: Console, description: str) -> None:
        self._console, self._description = console, description
        self._started, self._over = time.monotonic(), threading.Event()

    def advance(self, steps: float = 1, note: str = "") -> None:
        pass

    def __enter__(self) -> Self:
        threading.Thread(target=self._say, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _say(self) -> None:
        while not self._over.wait(LINE_EVERY_S):
            _plain(self._console, f"  {self._description}: {units.seconds(time.monotonic() - self._started)} so far")


class _Share(TaskProgressColumn):
    """Percent done; nothing for work that cannot tell."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class _Clock(TimeRemainingColumn):
    """Time left; time gone for work that cannot tell how far it is."""

    def render(self, task: Task) -> Text:
        return Text(units.seconds(task.elapsed or 0.0), style="progress.elapsed") if task.total is None else super().render(task)


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
        expected: about how many seconds a step will take, by id, where that is known.
    """

    def __init__(self, console: Console, steps: Sequence[tuple[str, str]], quiet: bool = False, expected: Mapping[str, float | None] | None = None) -> None:
        self._console, self._quiet = console, quiet
        self._steps = {step_id: _Step(step_id, title, (expected or {}).get(step_id)) for step_id, title in steps}
        self._timer = threading.Timer(0, _plain)  # says that a step started; none is running yet
        self._bars = Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=24),
            _Share(),
            _Clock(compact=True),
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
        self._timer.cancel()
        steps = list(self._steps.values())
        if self._live:
            self._live.stop()
            for stage in self._stages():
                if any(s.over for s in stage):
                    self._console.print(_stage_line(stage))
        if self._quiet:
            return
        for line in _held_back(steps):
            if self._live:
                self._console.print(Text(f"  {line}", style="yellow"), soft_wrap=True)
            else:
                _plain(self._console, line)

    def _stages(self) -> list[list[_Step]]:
        """Steps by stage, in the order of the stages."""
        stages: dict[str, list[_Step]] = {}
        for step in self._steps.values():
            stages.setdefault(step.stage, []).append(step)
        return list(stages.values())

    def _render(self) -> RenderableType:
        """One line a stage and one a bar, never more than the terminal is high: what is further from the running stage is left out."""
        stages = self._stages()
        lines = [_stage_line(stage) for stage in stages]
        running = next((i for i, stage in enumerate(stages) if any(s.state == "running" for s in stage)), sum(all(s.over for s in st) for st in stages))
        room = max(1, self._console.height - MARGIN - len(self._bars.tasks) - 3)  # 3: what says that lines are left out, and the time left
        first = min(max(0, running - room + 2), max(0, len(lines) - room))
        shown: list[RenderableType] = [Text(f"✓ {units.plural(first, 'earlier stage')}", style="green")] if first else []
        for i, line in list(enumerate(lines))[first : first + room]:
            shown.append(line)
            if i == running and self._bars.tasks:
                shown.append(self._bars.get_renderable())
        if running >= len(lines) and self._bars.tasks:
            shown.append(self._bars.get_renderable())
        if (later := len(lines) - first - room) > 0:
            shown.append(Text(f"· {units.plural(later, 'later stage')}", style="dim"))
        if left := self._left():
            shown.append(Text(f"  {units.time_left(left)}", style="dim"))
        return Group(*shown)

    def _left(self) -> float | None:
        """Seconds until the run ends; None if the time of a step that is not over is unknown."""
        known = [step.left for step in self._steps.values() if not step.over]
        return None if None in known else sum(left for left in known if left is not None)

    def step_started(self, step_id: str, title: str) -> None:
        """A step begins to run; one that was not planned is added to the list. What was never run before is taken to last as long as its stage's others."""
        step = self._steps.setdefault(step_id, _Step(step_id, title))
        alike = [s.seconds for s in self._steps.values() if s.stage == step.stage and s.state in {"done", "built"}]
        if step.expected is None and alike:
            step.expected = statistics.median(alike)
        step.title, step.state, step.started = title, "running", time.monotonic()
        if not self._live and not self._quiet:
            self._timer = threading.Timer(STARTED_AFTER_S, _plain, (self._console, f"{title}: started"))
            self._timer.daemon = True
            self._timer.start()

    def step_finished(self, step_id: str, seconds: float, cached: bool, status: str, reason: str | None = None) -> None:
        """A step ended. One that ended short of a result, with a reason, is told at the end, together with others of that reason.

        Args:
            seconds: it took now.
            cached: it was read back, not run.
            status: "ok", or any other of a report's step states ("built", "unavailable", "failed").
            reason: for a status other than "ok".
        """
        self._timer.cancel()
        step = self._steps.setdefault(step_id, _Step(step_id, step_id))
        step.state = status if status not in {"ok", "done"} else "cached" if cached else "done"
        step.seconds, step.reason = seconds, split_remedy(reason)[0] if reason else ""
        if not self._live and (step.failed or not (self._quiet or step.reason)):
            _plain(self._console, f"{step.title}: {step.note}")

    def log(self, message: str) -> None:
        """One line worth keeping, above the live list."""
        if self._quiet:
            return
        if self._live:
            self._console.print(Text(message), soft_wrap=True)
        else:
            _plain(self._console, message)

    def track(self, description: str, total: float | None) -> ContextManagerOfBar:
        return self._track(description, total)

    @contextmanager
    def _track(self, description: str, total: float | None) -> Iterator[Bar]:
        if self._quiet:
            yield _QuietBar()
        elif self._live:
            task = self._bars.add_task(description, total=total, note="")
            try:
                yield _LiveBar(self._bars, task)
            finally:
                self._bars.remove_task(task)
        elif total is None:
            with _WaitingLogBar(self._console, description) as bar:
                yield bar
        else:
            yield _LogBar(self._console, description, total)
