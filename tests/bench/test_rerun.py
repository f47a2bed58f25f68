import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tiny_onnx

from deployopt import report as reports
from deployopt.artifact import Row
from deployopt.bench.comparison import Gates, compare
from deployopt.bench.disturbance import Limits
from deployopt.bench.harness import Settings, Subject, measure, with_figures, write_samples
from deployopt.bench.images import natural_noise
from deployopt.bench.repeats import aa_repeats
from deployopt.bench.rerun import Plan, is_enough, measure_pair, rerun, summarize
from deployopt.bench.scenarios import Scenario
from deployopt.errors import UsageError
from deployopt.runtime.hashing import sha256_file
from deployopt.runtime.progress import SilentProgress
from deployopt.runtime.session import SessionOptions
from deployopt.runtime.statistics import Ratio, ratio_over_lifetimes

ANY = Limits(
    max_spread=100.0, max_drift=100.0, max_contention=100.0, max_pressure=100.0, max_steal_percent=100.0, max_clock_drop=100.0
)  # quiet is not what is tested
LOUD = Settings(min_seconds=0.05, limits=ANY)
IMAGES = natural_noise(8, 16, 16, 3, 0)
QUICK = Plan(lifetimes=3, precision=100.0, seconds=0.05, settings=LOUD)


def run_folder(folder, scenario="single_stream", **model):
    """A run with one measured row, its artifact and its samples written by what writes them in a run."""
    folder.mkdir()
    path = tiny_onnx.convolution(folder / "model.onnx", **model)
    asked = Scenario(scenario, 1 if scenario == "single_stream" else 2)
    subject = Subject("qat/onnxruntime/fp32", "worker_openers:OnnxRuntimeSession", path, asked.options(SessionOptions()), scenario)
    measured = measure([subject], IMAGES, LOUD, SilentProgress())[subject.key]
    sweep = "" if scenario == "single_stream" else scenario
    row = with_figures(Row("qat", "onnxruntime", "fp32", 1, "ok", scenario=scenario, sweep=sweep), measured)
    row.artifact = {"path": path.name, "sha256": sha256_file(path), "bytes": path.stat().st_size}
    row.samples = write_samples(measured, row, folder).name
    document = {"schema": 1, "environment": {}, "variants": [], "rows": [row.to_json()]}
    (folder / "report.json").write_text(json.dumps(document))
    return reports.load(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return run_folder(folder / "base"), run_folder(folder / "new", channels=48, layers=4)


def test_stored_samples_are_read_as_they_are_written(runs):
    base, new = runs
    (row,) = compare(base, new, base.folder, new.folder, Gates(max_throughput_regression=0.0)).rows
    assert row.interval_from == "block medians"
    assert row.ratio > 1.5
    assert row.throughput_ratio < 1
    assert row.regressions == ("throughput",)


def test_a_slower_artifact_is_slower_when_measured_again(runs):
    base, new = runs
    found = rerun(base, new, QUICK, SilentProgress())
    (row,) = compare(base, new, base.folder, new.folder, Gates(max_latency_regression=0.05), reran=found).rows
    assert (row.verdict, row.regressions, row.interval_from) == ("slower", ("latency",), "process lifetimes")
    assert row.ratio_ci95[0] > 1.2
    assert row.throughput_ratio_ci95[1] < 1
    assert row.memory_ratio == pytest.approx(1, abs=0.5)


def test_images_that_are_given_are_what_is_timed(runs):
    base, new = runs
    (said,) = rerun(base, new, QUICK, SilentProgress(), images=np.zeros((4, 5, 5, 3), np.uint8)).values()
    assert "found images of [1, 3, 5, 5]" in said


def test_an_offline_row_is_measured_offline_again_and_judged_by_throughput(tmp_path, monkeypatch):
    base, new = run_folder(tmp_path / "base", "offline"), run_folder(tmp_path / "new", "offline", channels=48, layers=4)
    opened = []
    monkeypatch.setattr("deployopt.bench.rerun.measure_pair", lambda subjects, *rest: opened.extend(subjects) or measure_pair(subjects, *rest))
    found = rerun(base, new, QUICK, SilentProgress())
    assert [(s.scenario, s.options.streams, s.threads) for s in opened] == [("offline", 2, 2)] * 2
    gates = Gates(max_latency_regression=0.0, max_throughput_regression=0.05)
    for reran in (found, None):
        result = compare(base, new, base.folder, new.folder, gates, reran=reran)
        (row,) = result.rows
        assert (row.key, row.judged_by) == ("qat/onnxruntime/fp32/b1/offline", "throughput")
        assert (row.verdict, row.regressions) == ("slower", ("throughput",))
        assert result.misses[-1].startswith("no row's latency could be compared")


@pytest.mark.parametrize("spread", [0.006, 0.01, 0.014])
def test_stopping_by_width_costs_little_coverage(spread):
    """As `measure_pair` stops, by ratios of lifetimes whose true value is 1."""
    rng, plan, covered = np.random.default_rng(3), Plan(), 0
    for _ in range(1500):
        ratios = np.exp(rng.normal(0, spread, 2 * plan.lifetimes))
        enough = (n for n in range(len(ratios) + 1) if is_enough(plan, n, 0, partial(ratio_over_lifetimes, ratios[:n])))
        found = ratio_over_lifetimes(ratios[: next(enough)])
        covered += found.low <= 1 <= found.high
    assert 0.92 <= covered / 1500 <= 0.97


def test_rows_of_two_devices_and_outputs_that_are_no_numbers_are_not_compared(runs, tmp_path):
    base, new = runs
    key = "qat/onnxruntime/fp32/b1"
    elsewhere = {**new.rows[0], "contract": {**new.rows[0]["contract"], "device": "cuda:0"}}
    (tmp_path / "report.json").write_text(json.dumps({**new, "rows": [elsewhere]}))
    assert rerun(base, reports.load(tmp_path), QUICK, SilentProgress())[key] == "device: cpu → cuda:0"
    nan = tiny_onnx.computing_nan(base.folder / "model.onnx", tmp_path / "nan.onnx")
    sides = [Subject(side, "worker_openers:OnnxRuntimeSession", path, SessionOptions(1)) for side, path in (("base", base.folder / "model.onnx"), ("new", nan))]
    assert measure_pair((sides[0], sides[1]), 1, QUICK, SilentProgress()) == "new: its outputs are NaN or infinite for batches of 1"


def test_what_cannot_be_measured_again_says_why(runs, tmp_path):
    base, new = runs
    key = "qat/onnxruntime/fp32/b1"
    (tmp_path / "report.json").write_text(json.dumps(new))  # without the artifact beside it
    assert "is gone" in rerun(base, reports.load(tmp_path), QUICK, SilentProgress())[key]
    (tmp_path / "report.json").write_text(json.dumps({**new, "rows": [{**new.rows[0], "variant": "other"}]}))
    with pytest.raises(UsageError, match=rf"found none \(base: {key}; new: other/onnxruntime/fp32/b1\)"):
        rerun(base, reports.load(tmp_path), QUICK, SilentProgress())
    with pytest.raises(UsageError, match="at least 3 process lifetimes, found 2"):
        rerun(base, new, Plan(lifetimes=2), SilentProgress())


@pytest.mark.parametrize(("lifetimes", "seconds", "half", "enough"), [
    (4, 99, 0.0, False), (5, 10, 0.02, False), (5, 10, 0.009, True), (5, 51, 0.02, True), (9, 53, 0.02, False), (9, 55, 0.02, True), (10, 1, 0.02, True),
])  # fmt: skip
def test_a_row_ends_with_its_precision_its_budget_or_twice_its_lifetimes(lifetimes, seconds, half, enough):
    assert is_enough(Plan(budget=60), lifetimes, seconds, lambda: Ratio(1, 1 - half, 1 + half)) is enough


def test_blocks_are_short_with_one_thread_and_long_where_threads_must_fall_asleep_between_them(runs):
    path = runs[0].folder / "model.onnx"
    for threads, pause_ms in ((1, 0), (2, 20)):
        pair = tuple(Subject(side, "worker_openers:OnnxRuntimeSession", path, SessionOptions(threads)) for side in ("base", "new"))
        ((base, _), *_) = measure_pair(pair, 1, Plan(1, 100.0, 0, seconds=1.2, settings=LOUD), SilentProgress())
        assert base.contract["pause_ms"] == pause_ms
        assert (base.contract["blocks"] > 40) == (threads == 1)  # about 100 of 12 ms, or 20 of 60 ms and never more than twice as many


@pytest.mark.slow  # nine pairs of processes
def test_lifetimes_are_added_until_the_interval_is_narrow_or_the_budget_used_and_noise_is_said(runs):
    path = runs[0].folder / "model.onnx"
    pair = tuple(Subject(side, "worker_openers:OnnxRuntimeSession", path) for side in ("base", "new"))
    strict = Settings(limits=replace(ANY, max_spread=1e-9))
    plans = (Plan(3, 0.0, 600, 0.02, settings=strict), Plan(3, 0.0, 0, 0.02, settings=strict))
    patient, short = (measure_pair(pair, 1, plan, SilentProgress()) for plan in plans)
    assert (len(patient), len(short)) == (6, 3)
    assert summarize(short).noise.startswith("3 of 3 lifetimes were noisy, as the interval shows: MAD/median")


def test_an_injected_slowdown_is_found(runs):
    path = runs[1].folder / "model.onnx"
    base, slow = (Subject(s, "worker_openers:OnnxRuntimeSession", path, SessionOptions(extra=extra)) for s, extra in (("a", {}), ("b", {"slowdown": 1.0})))
    pairs = measure_pair((base, slow), 1, replace(QUICK, seconds=0.3), SilentProgress())
    assert not isinstance(pairs, str)
    found = summarize(pairs)
    assert found.latency.low > 1.2  # twice as slow, on a machine that other tests load
    assert found.lifetimes == 3


def test_repeats_keep_every_lifetime(runs):
    subject = Subject("a", "worker_openers:OnnxRuntimeSession", runs[0].folder / "model.onnx")
    first = measure([subject], IMAGES, LOUD, SilentProgress())["a"]
    found = aa_repeats(subject, {1: first}, 2, LOUD, IMAGES, SilentProgress())
    assert found[1]["p50_ms"][0] == first.host["p50"]
    assert [len(values) for values in found[1].values()] == [5, 5, 2]  # two processes a repeat, and the first
    assert all(0.3 < ratio < 3 for ratio in found[1]["same_rounds"])
    assert aa_repeats(subject, {1: first}, 0, LOUD, IMAGES, SilentProgress()) == {}
