import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import tiny_onnx

from deployopt.artifact import Row
from deployopt.bench.disturbance import Limits
from deployopt.bench.harness import Failure, Group, Measured, Settings, Subject, _summarize, make_buffers, measure, speedup, with_figures, write_samples
from deployopt.report.summary import split_remedy
from deployopt.runtime import host
from deployopt.runtime.progress import SilentProgress
from deployopt.runtime.session import SessionOptions
from deployopt.runtime.worker import Worker

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
# tests share the machine with anything: what they assert is the bookkeeping and the ratios, not the quiet
LENIENT = Limits(max_spread=100.0, max_drift=100.0, max_contention=100.0, max_pressure=100.0, max_steal_percent=100.0, max_clock_drop=100.0)
SETTINGS = Settings(min_seconds=0.2, limits=LENIENT, timeout_s=60.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_onnx.convolution(tmp_path_factory.mktemp("models") / "tiny.onnx", channels=16, layers=3)


def subject(key, path, opener="OnnxRuntimeSession", **extra):
    return Subject(key, f"worker_openers:{opener}", path, SessionOptions(extra=extra))


@pytest.fixture(scope="module")
def results(model):
    """One comparison of good, slow and failing sessions, read by many tests."""
    subjects = [
        subject("a", model),
        subject("same", model),
        subject("slow", model, slowdown=0.3),
        subject("openvino", model, "OpenVinoSession"),
        subject("unopened", model, "segfault"),
        subject("crashing", model, "CrashingSession", crash_at=400),
    ]
    return measure(subjects, IMAGES, SETTINGS, SilentProgress(), batch=2, source="test images")


def test_every_subject_has_a_result_in_order(results):
    assert list(results) == ["a", "same", "slow", "openvino", "unopened", "crashing"]
    assert [type(r) for r in results.values()] == [Measured] * 4 + [Failure] * 2


def test_a_failure_names_its_cause_and_remedy_without_paths(results, model):
    what, remedy = split_remedy(results["unopened"].reason)
    assert what == "opening tiny.onnx in a child process: it was ended by SIGSEGV"
    assert remedy == "native code of the runtime crashed: try another version of it, or leave this backend out"
    assert "SIGSEGV" in results["crashing"].reason
    assert not any(str(model.parent) in r.reason for r in results.values() if isinstance(r, Failure))


def test_a_against_a_is_one(results):
    value, (low, high) = speedup(results["a"], results["same"])
    assert value == pytest.approx(1, abs=0.25)  # other tests run beside this one
    assert low - 0.2 <= 1 <= high + 0.2


def test_an_injected_slowdown_is_found(results):
    value, (low, high) = speedup(results["a"], results["slow"])
    assert value == pytest.approx(1 / 1.3, abs=0.15)
    assert low <= value <= high < 1


def test_the_pressure_on_short_blocks_is_a_share_of_the_time_they_took(model):
    """The way to the session and back takes longer than these blocks do; processes that want every core wait meanwhile too."""
    wanting = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * host.usable_cores())]
    try:
        found = measure([subject("short", model)], IMAGES, replace(SETTINGS, min_seconds=0.005), SilentProgress())["short"]
    finally:
        for process in wanting:
            process.kill()
            process.wait()
    pressure = found.contract["load"]["pressure_percent"]
    assert pressure is None or 0 < pressure <= 101  # the kernel's counter and the clock are not read at once


def test_figures_come_from_all_blocks(results):
    found = results["a"]
    assert len(found.block_medians_ms) == found.contract["blocks"] >= 20
    assert found.host["n"] == found.contract["blocks"] * found.contract["iterations"]
    assert found.host["p50"] <= found.host["p90"]
    assert found.host["p50_ci95"][0] <= found.host["p50_ci95"][1]
    assert found.throughput_per_s == np.median(found.block_throughputs_per_s)
    assert found.host["p50"] == np.median(found.block_medians_ms)
    assert found.contract["p50_and_throughput"] == "medians of the blocks' own"
    assert found.peak_memory_bytes > 10 << 20
    assert found.device is None


def test_short_blocks_are_more_blocks_and_one_thread_waits_for_none(model):
    short = replace(SETTINGS, min_seconds=0.4, block_s=0.002)  # over 1,000 runs
    one = measure([subject("a", model)], IMAGES, short, SilentProgress())["a"]
    two = measure([Subject("a", "worker_openers:OnnxRuntimeSession", model, SessionOptions(2))], IMAGES, short, SilentProgress())["a"]
    for found, pause_ms in ((one, 0), (two, 20)):
        assert found.contract["pause_ms"] == pause_ms
        assert len(found.block_medians_ms) == found.contract["blocks"] > 20
        assert found.contract["duration_s"] >= 0.4


def test_a_figure_lies_inside_its_interval_where_some_blocks_were_disturbed(model, monkeypatch):
    """A few blocks so slow that the time of all together is theirs: images of all blocks / their time would lie outside the interval."""
    measure_block, slow = Worker.block, iter([20.0] * 3 + [1.0] * 200)

    def disturbed(*arguments):
        block, factor = measure_block(*arguments), next(slow)
        return block._replace(host_ns=block.host_ns * factor, wall_s=block.wall_s * factor)

    monkeypatch.setattr(Worker, "block", disturbed)
    found = measure([subject("a", model)], IMAGES, SETTINGS, SilentProgress())["a"]
    assert found.throughput_ci95[0] <= found.throughput_per_s <= found.throughput_ci95[1]
    assert found.host["p50_ci95"][0] <= found.host["p50"] <= found.host["p50_ci95"][1]
    pooled = found.host["n"] / found.contract["duration_s"]
    assert pooled < found.throughput_ci95[0]


def test_the_contract_says_how(results):
    contract = results["a"].contract
    assert contract["clock"] == "host"
    assert contract["warm_up"]["runs"] >= 10
    assert contract["warm_up"]["seconds"] >= 0.2
    assert set(contract["interleaved_with"]) - {"crashing"} == {"openvino", "same", "slow"}  # it may crash while still warming up
    assert contract["shuffled"] is True
    assert contract["inputs"] == {"buffers": 8, "shape": [2, 16, 16, 3], "types": ["float32"], "images": 20, "source": "test images"}
    assert contract["spread"]["limit"] == 100.0
    assert contract["duration_s"] >= 0.15
    assert {
        "steal_percent",
        "other_cpu_percent",
        "pressure_percent",
        "drift_percent",
        "load_average",
        "gpu_power_w",
        "own_gpu",
        "core_clock_mhz",
        "frequency_mhz",
        "gpus",
    } == set(contract["load"])


def test_ratios_across_comparisons_are_refused(results, model):
    other = measure([subject("elsewhere", model)], IMAGES, SETTINGS, SilentProgress())["elsewhere"]
    with pytest.raises(ValueError, match="same rounds"):
        speedup(other, results["a"])


def test_spread_beyond_the_limit_is_invalid(model):
    settings = Settings(min_seconds=0.1, limits=replace(LENIENT, max_spread=1e-9))
    found = measure([subject("a", model)], IMAGES, settings, SilentProgress())["a"]
    assert "MAD/median" in found.invalid
    row = with_figures(Row("v", "onnxruntime", "fp32", 1, "ok"), found)
    assert (row.status, row.reason) == ("invalid", found.invalid)
    assert row.latency_ms["host"]["p50"] > 0


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="reads Linux's /proc/stat")
def test_other_load_is_seen(model):
    import subprocess

    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(len(os.sched_getaffinity(0)))]
    try:
        found = measure([subject("a", model)], IMAGES, Settings(min_seconds=0.5), SilentProgress())["a"]
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    assert found.contract["load"]["other_cpu_percent"] > 25
    pressure = found.contract["load"]["pressure_percent"]
    assert pressure is None or pressure > 25  # None: this kernel keeps no pressure stall information
    assert "other processes used" in found.invalid or "processes waited for a CPU" in found.invalid  # by how the kernel shared the cores out


def test_a_median_is_told_of_few_runs_and_more_time_is_taken_where_more_is_asked_for():
    figures, medians = _summarize([np.array([2e6, 4e6, 3e6])], seed=0)
    assert (figures["p50"], medians, figures["p90"]) == (3.0, [3.0], None)
    assert list(figures["reasons"]) == ["p90", "p95", "p99"]
    assert [Settings(min_seconds=s).longest_s for s in (3, 120)] == [60, 240]


def test_outliers_are_counted_and_flagged(model):
    settings = Settings(min_seconds=0.2, limits=LENIENT)
    contract = measure([subject("a", model, "StutteringSession")], IMAGES, settings, SilentProgress())["a"].contract
    assert contract["outliers"]["above"] == "2 medians"
    assert 5 < contract["outliers"]["percent"] < 40
    assert "more than 1 % of the runs took over 2 medians" in contract["flags"]


def test_a_slow_subject_stops_in_time_and_says_so(model):
    settings = Settings(min_seconds=0.2, max_seconds=0.05, limits=LENIENT)
    found = measure([subject("a", model)], IMAGES, settings, SilentProgress())["a"]
    assert found.contract["blocks"] < 20
    assert any("blocks within" in flag for flag in found.contract["flags"])
    assert speedup(found, found)[1] is None


def test_a_row_that_falls_short_says_so(model, monkeypatch):
    """A warm-up that takes the model for far slower than it is makes blocks so short that even twice as many of them are not enough."""
    warm_up = Worker.warm_up
    monkeypatch.setattr(Worker, "warm_up", lambda worker: warm_up(worker)._replace(estimate_ms=100.0))
    found = measure([subject("a", model)], IMAGES, replace(SETTINGS, min_seconds=1.0), SilentProgress())["a"]
    assert found.contract["blocks"] == 40
    (flag,) = [flag for flag in found.contract["flags"] if flag.startswith("too short for a headline: ")]
    assert flag.endswith("s of 3 s, 40 of 1000 runs")


def test_a_row_whose_core_slowed_down_is_invalid(model, monkeypatch):
    clocks, block = iter(np.linspace(3000.0, 1000.0, 60).tolist()), Worker.block
    monkeypatch.setattr(Worker, "block", lambda *arguments: block(*arguments)._replace(core_clock_mhz=next(clocks)))
    found = measure([subject("a", model)], IMAGES, replace(SETTINGS, limits=replace(LENIENT, max_clock_drop=0.1)), SilentProgress())["a"]
    first, lowest, last = found.contract["load"]["core_clock_mhz"]
    assert (first, lowest) == (3000.0, last)
    assert "the clock of the CPU core that it was timed on fell from" in found.invalid


def test_batch_that_an_artifact_cannot_run_fails_only_that_row(tmp_path, model):
    fixed = tiny_onnx.convolution(tmp_path / "fixed.onnx", batch=1)
    with Group([subject("fixed", fixed), subject("free", model)], SETTINGS, SilentProgress()) as group:
        images = {"fixed": IMAGES, "free": IMAGES}
        four, one = group.measure(images, 4, "test"), group.measure(images, 1, "test")
    assert isinstance(four["fixed"], Failure)
    assert "dynamic batch" in four["fixed"].reason or "takes [1, 3, 16, 16]" in four["fixed"].reason
    assert isinstance(four["free"], Measured)
    assert isinstance(one["fixed"], Measured)


def test_buffers_hold_different_images():
    images = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1)
    buffers = make_buffers(images, 8, 2, seed=0)
    assert buffers.shape == (8, 2, 1, 1, 1)
    assert len(set(buffers.ravel().tolist())) == 16
    with pytest.raises(ValueError, match="found none"):
        make_buffers(images[:0], 8, 1, seed=0)


def test_subjects_need_different_keys(model):
    with pytest.raises(ValueError, match="different keys"):
        Group([subject("a", model), subject("a", model)], SETTINGS, SilentProgress())


def test_samples_are_the_block_medians(results, tmp_path):
    import json

    path = write_samples(results["a"], Row("qat", "openvino", "int8", 2, "ok"), tmp_path)
    assert path.name == "qat-openvino-int8-b2.json"
    content = json.loads(path.read_text())
    assert content["host_block_medians"] == results["a"].block_medians_ms
    assert content["unit"] == "ms"


def test_the_contracts_device_is_what_executes(model):
    asked = Subject("a", "worker_openers:OnnxRuntimeSession", model, SessionOptions(device="cuda:0"))
    found = measure([asked], IMAGES, SETTINGS, SilentProgress())["a"]
    assert found.contract["device"] == "cpu"


def test_a_subject_without_images_is_left_out(model):
    with Group([subject("a", model), subject("b", model)], SETTINGS, SilentProgress()) as group:
        found = group.measure({"b": IMAGES}, 1, "test images")
    assert list(found) == ["b"]
    assert found["b"].contract["interleaved_with"] == []


def test_sessions_that_build_an_engine_are_opened_alone(model, tmp_path, monkeypatch):
    import worker_openers

    path = tmp_path / model.name
    shutil.copy(model, path)
    monkeypatch.setattr(host, "usable_cores", lambda: 4)
    monkeypatch.setattr(worker_openers, "builds_on_opening", True, raising=False)
    with Group([subject(name, path, "SlowOpening", name=name) for name in "abc"], SETTINGS, SilentProgress()) as group:
        assert set(group.opened) == set("abc")
    spans = sorted(tuple(map(float, file.read_text().split())) for file in tmp_path.glob("*.opened"))
    assert all(ended <= began for (_, ended), (began, _) in pairwise(spans))
