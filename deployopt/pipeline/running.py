"""Plan → run folder: the one loop."""

from __future__ import annotations

import functools
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from deployopt import report, store
from deployopt.bench.environment import environment, utc_now
from deployopt.errors import UsageError
from deployopt.pipeline.document import assemble
from deployopt.pipeline.inspection import REPORTED
from deployopt.pipeline.invocation import RESULT, Invocation, load_data, read_output, write_result
from deployopt.pipeline.planning import Plan, Step
from deployopt.recipe import read_document
from deployopt.runtime.files import atomic_write, atomic_write_json, is_left_behind
from deployopt.runtime.hashing import sha256_json
from deployopt.runtime.process import interrupts_kept
from deployopt.runtime.progress import Progress, SilentProgress
from deployopt.stages import StepOutput, StepResult

log = logging.getLogger(__name__)


class Observer(Progress, Protocol):
    """Who watches a run: progress, and the beginning and end of each step."""

    def step_started(self, step_id: str, title: str) -> None: ...

    def step_finished(self, step_id: str, seconds: float, cached: bool, status: str, reason: str | None) -> None: ...


class SilentObserver(SilentProgress):
    """For library use and tests."""

    def step_started(self, step_id: str, title: str) -> None:
        pass

    def step_finished(self, step_id: str, seconds: float, cached: bool, status: str, reason: str | None) -> None:
        pass


def execute(planned: Plan, run_dir: Path | None = None, observer: Observer | None = None, *, fresh: bool = False) -> report.Report:
    """Run a plan and return its report; everything is written into the run folder.

    Args:
        run_dir: the run folder itself; one that exists is continued. None makes `runs/<recipe>-<utc>-<hash8>`.
        fresh: take nothing from the cache.

    Afterwards the cache is pruned to `store.size_cap()`, without what this run used.

    Raises:
        UsageError: the folder holds something else than a run of this recipe, or $DEPLOYOPT_CACHE_MAX_SIZE no size.
        DataNotFound, MissingDependency, StageFailed, RunLocked.
    """
    if planned.data_problem is not None:
        raise planned.data_problem
    watcher, size_cap = observer or SilentObserver(), store.size_cap()
    sha = sha256_json(planned.resolved)
    folder = run_dir or store.new_run_folder(Path("runs"), planned.recipe.name, sha)
    with store.locked(folder), _log_into(folder / "log.txt"):
        started = utc_now()
        _adopt(folder, planned)
        atomic_write(folder / "recipe.yaml", planned.recipe.document.to_yaml())
        where = environment(sorted({d for s in planned.steps for d in s.stage.distributions} | set(REPORTED)))
        atomic_write_json(folder / "environment.json", where)
        runner = _Runner(planned, folder, watcher, fresh)
        with interrupts_kept():
            outputs = [runner.run(step) for step in planned.steps]
        document = assemble(planned, outputs, runner.dataset_facts(), where, started, folder.name, sha)
        report.write_all(document, folder)
        _prune_cache(planned, size_cap)
        return report.load(folder)


def _prune_cache(planned: Plan, size_cap: int) -> None:
    removed, left = planned.cache.prune(size_cap, spare={step.key for step in planned.steps if step.key is not None})
    if removed:
        log.info("the cache was over its %.1f GB: removed the %d longest unused steps, %.1f GB left", size_cap / 1e9, removed, left / 1e9)


def _adopt(folder: Path, planned: Plan) -> None:
    """Make sure that the folder is new or a run of this recipe, and clear what this plan will not make again."""
    left = [p for p in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")) if is_left_behind(p.name)]  # by a killed run: this one holds the folder's lock
    found = sorted(p.name for p in folder.iterdir() if p not in left and p.name not in {".lock", ".owner.json", "log.txt"})
    if found and "recipe.yaml" not in found:
        raise UsageError(f"wanted a run folder, found {folder.name} with {', '.join(found[:5])}", "choose another folder with --run-dir")
    if found:
        earlier = read_document(folder / "recipe.yaml").data.get("name")
        if earlier != planned.recipe.name:
            raise UsageError(f"{folder.name} is a run of the recipe '{earlier}', not of '{planned.recipe.name}'", "choose another folder with --run-dir")
    for temporary in left:
        temporary.unlink()
    steps = {step.id for step in planned.steps}
    for old in [p.parent for p in folder.glob(f"*/{RESULT}") if p.parent.name not in steps]:
        shutil.rmtree(old)
    shutil.rmtree(folder / "samples", ignore_errors=True)


class _LoggedProgress:
    """Progress whose lines also go into the run's log.txt, whatever is shown."""

    def __init__(self, observer: Observer) -> None:
        self.track = observer.track
        self._observer = observer

    def log(self, message: str) -> None:
        log.info("%s", message)
        self._observer.log(message)


class _Runner:
    """Runs the steps of one plan in one run folder, remembering what they left."""

    def __init__(self, planned: Plan, folder: Path, observer: Observer, fresh: bool) -> None:
        self._plan = planned
        self._folder = folder
        self._observer = observer
        self._progress = _LoggedProgress(observer)
        self._fresh = fresh
        self._outputs: dict[str, StepOutput] = {}
        self._digests: dict[str, str] = {}
        self._dataset = functools.cache(lambda: load_data(planned, self._progress))

    def dataset_facts(self) -> dict[str, Any]:
        dataset = self._dataset()
        return {
            "dataset": {"name": self._plan.recipe.data.name, "train": len(dataset.train), "validation": len(dataset.validation), "test": len(dataset.test)},
            "classes": list(dataset.classes),
        }

    def run(self, step: Step) -> StepOutput:
        log.info("%s: started", step.id)
        self._observer.step_started(step.id, step.title)
        began = time.perf_counter()
        if not step.runnable:
            output = self._not_run(step)
        elif step.key is None:
            output = self._uncached(step)
        else:
            output = self._cached(step)
        self._outputs[step.id] = output
        status = str(output.record.get("status", "ok"))
        reason = output.record.get("reason")
        log.info("%s: %s%s in %.1f s%s", step.id, status, " (cached)" if output.cached else "", time.perf_counter() - began, f": {reason}" if reason else "")
        self._observer.step_finished(step.id, time.perf_counter() - began, output.cached, status, reason)
        return output

    def _not_run(self, step: Step) -> StepOutput:
        record = {"status": "unavailable", "reason": step.expansion.why_not}
        return StepOutput(step.id, step.stage_name, step.expansion.makes, record, {}, self._folder, cached=False, seconds=0.0)

    def _uncached(self, step: Step) -> StepOutput:
        folder = self._folder / step.id
        folder.mkdir(exist_ok=True)
        began = time.perf_counter()
        result = self._invoke(step, folder, store.StoredChoices(folder / "choices.json"))
        seconds = time.perf_counter() - began
        write_result(result, folder)
        self._plan.cache.remember_seconds(step.kind, seconds)
        return read_output(step, folder, cached=False, seconds=seconds)

    def _cached(self, step: Step) -> StepOutput:
        assert step.key is not None
        inputs = tuple(self._digests[i] for i in step.inputs if i in self._digests)
        cache = self._plan.cache
        with cache.holding(step.key, lambda: self._progress.log(f"{step.id}: waiting for another process that makes the same step")):
            entry = store.Miss("not looked up") if self._fresh else cache.find(step.key, inputs)
            hit = isinstance(entry, store.Entry)
            if not isinstance(entry, store.Entry):
                log.info("%s: not cached: %s", step.id, entry.why)
                with cache.writing(step.key) as folder:
                    began = time.perf_counter()
                    result = self._invoke(step, folder, cache.choices(step.key, inputs, fresh=self._fresh))
                    seconds = time.perf_counter() - began
                    if result.record.get("status") == "failed":  # perhaps it works next time: tell it, do not keep it
                        return StepOutput(step.id, step.stage_name, step.expansion.makes, result.record, {}, self._folder, cached=False, seconds=seconds)
                    write_result(result, folder)
                    entry = cache.commit(folder, step.key, step.parts, inputs, seconds)
            store.touch(entry)
            store.link(entry, self._folder / step.id)
        self._digests[step.id] = entry.digest
        return read_output(step, self._folder / step.id, cached=hit, seconds=entry.seconds)

    def _invoke(self, step: Step, folder: Path, choices: store.StoredChoices) -> StepResult:
        inputs = [self._outputs[p.step] for p in step.expansion.inputs]
        return Invocation(self._plan, step, inputs, folder, self._folder, choices, self._dataset, self._progress).result()


@contextmanager
def _log_into(path: Path) -> Iterator[None]:
    """Everything deployopt logs meanwhile goes into this file."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("deployopt")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    except Exception:
        logger.exception("the run ended")
        raise
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()
