"""Time any artifacts against each other: what `deployopt bench` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from deployopt import backends
from deployopt.artifact import INT8_PRECISIONS, NOT_VERIFIED, Row
from deployopt.bench import profiles
from deployopt.bench.environment import environment, reason_of
from deployopt.bench.harness import Failure, Group, Measured, Settings, Subject, speedup, with_figures
from deployopt.bench.images import SYNTHETIC, images_for
from deployopt.bench.scenarios import Scenario, ScenarioName
from deployopt.bench.targets import Target, distributions, measured_rows, opener, resolve
from deployopt.errors import DeployoptError, UsageError
from deployopt.runtime import host
from deployopt.runtime.hashing import sha256_json
from deployopt.runtime.progress import Progress


def bench_artifacts(
    artifacts: Sequence[str | Path],
    *,
    progress: Progress,
    backend: str | None = None,
    batch_sizes: Sequence[int] | None = None,
    seconds: float = 3.0,
    threads: int | None = None,
    scenario: ScenarioName | None = None,
    device: str = "cpu",
    images: NDArray[np.uint8] | None = None,
    seed: int = 0,
    profile: bool = False,
) -> list[Row]:
    """Time artifacts against each other; the first is the baseline of the speed-ups.

    Args:
        artifacts: as `targets.resolve` takes them; a run folder stands for everything that the run measured.
        backend: opens all of them; None takes the one of each file's kind or row.
        batch_sizes, threads, scenario: of all of them; None takes what an address names ("RUN:…/b8/offline"), else batch 1, all cores, single_stream.
            "offline" compares throughputs, with a stream for each of `threads`.
        images: real samples uint8 [n, H, W, C]; None makes natural-looking noise of each model's size and the contract says so.
        profile: then time the layers of each at each batch size, where its runtime can.

    Returns:
        A row for each artifact and batch size, artifact by artifact. `variant` is the file's name without suffix or the row's address, numbered
        where it is not unique: the same file twice is an A/A comparison. Status "failed" where it cannot be opened, does not take the batch or
        computes NaN, "unavailable" where this machine lacks the runtime or the device. What was measured has the machine and its software in its
        contract, as "environment", and of an INT8 .onnx what the runtime executes in INT8, as `verified`.

    Raises:
        UsageError: an address names another batch size, scenario or number of threads than was asked for, or than another address; layers are to be timed
            in the offline scenario; or as `targets.resolve`. ArtifactError: as `targets.resolve`.
    """
    targets = _numbered([resolve(each, backend) for a in artifacts for each in _expanded(a)])
    sizes = _agreed("--batch", None if batch_sizes is None else tuple(batch_sizes), [None if t.batch is None else (t.batch,) for t in targets], (1,))
    asked = Scenario(
        _agreed("--scenario", scenario, [t.scenario for t in targets], "single_stream"),
        _agreed("--threads", threads, [t.threads for t in targets], host.usable_cores()),
    )
    if profile and asked.name != "single_stream":
        raise UsageError(f"layers are timed one inference at a time, and the scenario is {asked.name}", "leave out --profile or --scenario")
    subjects, rows = _subjects(targets, asked, device)
    with Group(subjects, Settings(min_seconds=seconds, seed=seed), progress) as group:
        source = SYNTHETIC if images is None else "images that were given"
        given = {batch: _given(group, batch, images, seed) for batch in sizes}
        results = {batch: _measure(group, batch, given[batch], source) for batch in sizes}
        profiled = {batch: profiles.take(group, given[batch], batch, results[batch], progress) for batch in sizes if profile}
    timed = {key for found in results.values() for key, result in found.items() if isinstance(result, Measured)}
    _verify([(rows[t.name], t) for t in targets if t.name in timed], asked.threads, device, progress)  # when nothing is timed any more
    measured = [_row(rows[key], batch, results[batch], subjects[0].key) for key in rows for batch in sizes]
    where = environment(distributions(t.backend for t in targets))
    for row in measured:
        if row.contract is not None:
            row.contract = {**row.contract, "environment": where}
    return [profiles.with_profile(row, profiled.get(row.batch, {}).get(row.variant)) for row in measured]


def _subjects(targets: Sequence[Target], asked: Scenario, device: str) -> tuple[list[Subject], dict[str, Row]]:
    """What the harness opens, and each one's row before it is measured, by name."""
    subjects, rows = [], {}
    for target in targets:
        options = asked.options(target.session_options(asked.threads, device))
        subjects.append(Subject(target.name, opener(target.backend), target.path, options, asked.name))
        row = Row(target.name, target.backend, target.precision, 0, "failed", threads=asked.threads, scenario=asked.name)
        rows[target.name] = replace(row, options=dict(target.options), artifact=target.facts())
    return subjects, rows


Option = TypeVar("Option")


def _agreed(option: str, asked: Option | None, named: Sequence[Option | None], default: Option) -> Option:
    """What all artifacts are measured with: what was asked for, what addresses name, or the default. Raises UsageError where those contradict each other."""
    found = list(dict.fromkeys(value for value in (asked, *named) if value is not None))
    if len(found) > 1:
        said = " and ".join(",".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in found)
        wanted = f"{option} and the addresses" if asked is not None else "the addresses"
        raise UsageError(f"wanted one {option} for all artifacts, found {said}: {wanted} disagree", f"name rows without /bN, and give {option}")
    return found[0] if found else default


def _verify(timed: Sequence[tuple[Row, Target]], threads: int, device: str, progress: Progress) -> None:
    """Have the runtimes tell of the INT8 files what they execute in INT8, and write it into their rows; why not, where it fails.

    That a file has Q/DQ nodes says nothing of it: a runtime may have no kernel for them, or fuse them in other places. Which, its options may decide.
    """
    files: dict[tuple[Path, str, str], list[tuple[Row, Target]]] = {}
    for row, target in timed:
        if target.kind == "onnx" and target.precision in INT8_PRECISIONS and hasattr(backends.find(target.backend), "verify"):
            opened_with = sha256_json([target.precision, dict(target.options)])
            files.setdefault((target.path, target.backend, opened_with), []).append((row, target))
    with progress.track("see what runs in INT8", len(files)) as bar:
        for (path, backend, _), rows in files.items():
            module: Any = backends.find(backend)
            try:
                verified, notes = asdict(module.verify(path, rows[0][1].session_options(threads, device), progress, Settings().timeout_s)), []
            except DeployoptError as exc:
                verified, notes = None, [f"{NOT_VERIFIED}: {reason_of(exc, path.parent)}"]
            for row, target in rows:
                kept = {} if target.kept_in_float is None else {"kept_in_float": target.kept_in_float}
                row.verified, row.notes = None if verified is None else {**verified, **kept}, [*row.notes, *notes]
            bar.advance(1, path.name)


def _given(group: Group, batch: int, images: NDArray[np.uint8] | None, seed: int) -> dict[str, NDArray[np.uint8]]:
    """What each open session is timed with."""
    return {key: images_for(opened.inputs, batch, seed) if images is None else images for key, opened in group.opened.items()}


def _measure(group: Group, batch: int, given: Mapping[str, NDArray[np.uint8]], source: str) -> dict[str, Measured | Failure]:
    found = group.measure(given, batch, source)
    return {key: result if isinstance(result, Failure) else group.checked(result, given[key]) for key, result in found.items()}


def _row(row: Row, batch: int, results: dict[str, Measured | Failure], baseline_key: str) -> Row:
    result, baseline = results[row.variant], results[baseline_key]
    row = with_figures(replace(row, batch=batch), result)
    if isinstance(result, Measured) and isinstance(baseline, Measured):
        row.speedup, row.speedup_ci95 = speedup(baseline, result)
    return row


def _expanded(artifact: str | Path) -> Sequence[str | Path]:
    """A run folder as its measured rows, anything else as it is."""
    return measured_rows(Path(artifact)) if (Path(artifact) / "report.json").is_file() else [artifact]


def _numbered(targets: Sequence[Target]) -> list[Target]:
    names = [t.name for t in targets]
    return [t if names.count(t.name) == 1 else replace(t, name=f"{t.name}#{names[: i + 1].count(t.name)}") for i, t in enumerate(targets)]
