import copy
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from deployopt.artifact import Row
from deployopt.bench.comparison import Comparison, Gates, Reran, RowComparison, compare
from deployopt.bench.harness import write_samples
from deployopt.bench.rerun import Plan
from deployopt.errors import ArtifactError, UsageError
from deployopt.report import comparison as renderers
from deployopt.runtime.statistics import Ratio

BLOCKS = 40


def blocks(p50_ms: float, seed: int, noise: float = 0.01) -> list[float]:
    """Block medians of a made-up row."""
    return [float(v) for v in p50_ms * (1 + noise * np.random.default_rng(seed).standard_normal(BLOCKS))]


class Run:
    """A run folder with one row a given latency, written as a real run writes it."""

    def __init__(self, folder: Path, latencies: dict[str, float], seed: int, top1: float = 0.98) -> None:
        self.folder = folder
        (folder / "samples").mkdir(parents=True)
        self.report: dict[str, Any] = {
            "schema": 1,
            "run": folder.name,
            "task": {"name": "classification", "primary": "top1", "unit": "", "higher_is_better": True},
            "environment": {
                "cpu": {"model": "CPU A", "cores": 2},
                "gpus": [{"name": "GPU A", "driver": "550"}],
                "versions": {"onnxruntime": "1.24", "tensorrt-rtx-cu13": "1.5"},
            },
            "variants": [],
            "rows": [self._row(variant, p50, seed + i, top1) for i, (variant, p50) in enumerate(latencies.items())],
        }

    def _row(self, variant: str, p50: float, seed: int, top1: float) -> dict[str, Any]:
        medians = blocks(p50, seed)
        name = f"samples/{variant}-onnxruntime-int8-b1.json"
        throughputs = [1000 / m for m in medians]
        measured = SimpleNamespace(block_medians_ms=medians, device_block_medians_ms=None, block_throughputs_per_s=throughputs, contract={"iterations": 10})
        written = write_samples(measured, Row(variant, "onnxruntime", "int8", 1, "ok"), self.folder / "samples")  # type: ignore[arg-type]
        assert written == self.folder / name
        median = float(np.median(medians))
        return {
            "variant": variant,
            "backend": "onnxruntime",
            "precision": "int8",
            "batch": 1,
            "status": "ok",
            "reason": None,
            "provider": "CPU",
            "threads": 2,
            "options": {},
            "target": "local",
            "scenario": "single_stream",
            "samples": name,
            "accuracy": {"primary": "top1", "top1": top1, "n": 540},
            "latency_ms": {"host": {"p50": median, "p50_ci95": [median * 0.99, median * 1.01]}},
            "contract": {
                "clock": "perf_counter",
                "copies": True,
                "inputs": {"shape": [1, 3, 32, 32]},
                "waiting_threads": "spin",
                "shape_specialization": "eager",
            },
        }


def offline(run: Run, throughput: float) -> Run:
    """The run with its row as an offline one: with this many images a second, and a latency under load that says the opposite."""
    (row,) = run.report["rows"]
    row |= {"scenario": "offline", "sweep": "offline"}
    content = {"row": "qat/onnxruntime/int8/b1/offline", "host_block_medians": blocks(throughput, 1), "block_throughputs_per_s": blocks(throughput, 2)}
    (run.folder / row["samples"]).write_text(json.dumps(content))
    return run


def only(result: Comparison) -> RowComparison:
    assert len(result.rows) == 1
    return result.rows[0]


def compared(tmp_path: Path, base_ms: float, new_ms: float, **gates: Any) -> Comparison:
    base, new = Run(tmp_path / "base", {"qat": base_ms}, 1), Run(tmp_path / "new", {"qat": new_ms}, 1000)
    return compare(base.report, new.report, base.folder, new.folder, Gates(**gates))


@pytest.mark.parametrize(("new_ms", "verdict"), [(1.0, "same within noise"), (1.2, "slower"), (0.8, "faster")])
def test_verdicts(tmp_path: Path, new_ms: float, verdict: str) -> None:
    row = only(compared(tmp_path, 1.0, new_ms))
    assert row.verdict == verdict
    assert row.interval_from == "block medians"
    assert row.ratio == pytest.approx(new_ms, rel=0.02)
    assert row.ratio_ci95 is not None
    assert row.ratio_ci95[0] <= row.ratio <= row.ratio_ci95[1]


def test_the_gate_is_missed_only_beyond_noise(tmp_path: Path) -> None:
    clear = compared(tmp_path / "clear", 1.0, 1.1, max_latency_regression=0.05)
    assert not clear.met
    assert only(clear).regressions == ("latency",)
    borderline = compared(tmp_path / "borderline", 1.0, 1.053, max_latency_regression=0.05)
    assert only(borderline).verdict == "slower"
    assert borderline.met
    assert compared(tmp_path / "no_gate", 1.0, 3.0).met


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("environment", "cpu", "model"), "CPU B", "CPU model: CPU A → CPU B"),
        (("environment", "versions", "onnxruntime"), "1.25", "runtime version: onnxruntime 1.24 → onnxruntime 1.25"),
        (("environment", "cpu", "cores"), 4, "usable cores: 2 → 4"),
        (("environment", "cpu", "isa"), ["avx512_vnni", "avx2"], "ISA: none → avx2, avx512_vnni"),
        (("rows", 0, "threads"), 4, "threads: 2 → 4"),
        (("rows", 0, "contract", "streams"), 2, "streams: 1 → 2"),
        (("rows", 0, "contract", "cuda_graph"), "on", "CUDA graph: None → on"),
        (("rows", 0, "contract", "waiting_threads"), "block", "waiting threads: spin → block"),
        (("rows", 0, "contract", "shape_specialization"), "lazy", "kernels for a shape: eager → lazy"),
        (("rows", 0, "contract", "clock"), "cuda_event", "clock: perf_counter → cuda_event"),
        (("rows", 0, "contract", "inputs", "shape"), [1, 3, 64, 64], "input shape"),
        (("rows", 0, "contract", "device"), "cuda:1", "device: cuda:0 → cuda:1"),
        (("environment", "gpus", 0, "driver"), "560", "driver: ['550'] → ['560']"),
        (("rows", 0, "status"), "invalid", "new: invalid"),
    ],
)
def test_what_differs_is_named_and_not_compared(tmp_path: Path, path: tuple[Any, ...], value: Any, named: str) -> None:
    base, new = Run(tmp_path / "base", {"qat": 1.0}, 1), Run(tmp_path / "new", {"qat": 2.0}, 2)
    if path[-1] in {"device", "driver"}:
        for run in (base, new):
            run.report["rows"][0]["provider"] = "CUDAExecutionProvider"
            run.report["rows"][0]["contract"]["device"] = "cuda:0"
    target: Any = new.report
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = value
    result = compare(base.report, new.report, base.folder, new.folder, Gates(max_latency_regression=0.05))
    assert only(result).verdict == "not comparable"
    assert named in only(result).why
    assert only(result).ratio is None
    assert "no row's latency could be compared" in result.misses[-1]  # silence is no pass


@pytest.mark.parametrize("name", ["waiting_threads", "shape_specialization"])
def test_what_older_reports_do_not_tell_of_threads_and_kernels_is_no_difference(tmp_path: Path, name: str) -> None:
    base, new = Run(tmp_path / "base", {"qat": 1.0}, 1), Run(tmp_path / "new", {"qat": 1.0}, 2)
    del base.report["rows"][0]["contract"][name]
    for before, after in ((base, new), (new, base)):
        assert only(compare(before.report, after.report, before.folder, after.folder)).verdict == "same within noise"


def test_a_gpu_and_other_runtimes_do_not_matter_to_a_row_on_the_cpu(tmp_path: Path) -> None:
    base, new = Run(tmp_path / "base", {"qat": 1.0}, 1), Run(tmp_path / "new", {"qat": 1.0}, 2)
    new.report["environment"]["gpus"] = []
    new.report["rows"][0]["contract"]["device"] = "cpu"  # which older reports do not say
    new.report["environment"]["versions"]["tensorrt-rtx-cu13"] = "1.6"
    assert only(compare(base.report, new.report, base.folder, new.folder)).verdict == "same within noise"
    for run in (base, new):
        run.report["rows"][0]["provider"] = "CUDAExecutionProvider"
    assert "GPU model" in only(compare(base.report, new.report, base.folder, new.folder)).why


def test_added_and_removed_rows(tmp_path: Path) -> None:
    base, new = Run(tmp_path / "base", {"a": 1.0, "b": 1.0}, 1), Run(tmp_path / "new", {"b": 1.0, "c": 1.0}, 5)
    result = compare(base.report, new.report, base.folder, new.folder, Gates(max_latency_regression=0.05))
    assert [(r.key.split("/")[0], r.verdict) for r in result.rows] == [("a", "removed"), ("b", "same within noise"), ("c", "added")]
    assert [r.regressions for r in result.rows] == [("missing",), (), ()]
    assert result.misses == ("a/onnxruntime/int8/b1: was measured in the base and is not now: its row is gone",)
    assert compare(base.report, new.report, base.folder, new.folder, Gates(max_latency_regression=0.05, allow_missing=True)).met
    assert compare(base.report, new.report, base.folder, new.folder).met  # no gate was asked for


def test_missing_samples_fall_back_to_the_wider_interval_and_say_so(tmp_path: Path) -> None:
    base, new = Run(tmp_path / "base", {"qat": 1.0}, 1), Run(tmp_path / "new", {"qat": 1.2}, 2)
    (new.folder / "samples/qat-onnxruntime-int8-b1.json").unlink()
    row = only(compare(base.report, new.report, base.folder, new.folder))
    assert (row.verdict, row.interval_from) == ("slower", "p50_ci95")
    assert "block medians are missing" in row.why
    new.report["rows"][0]["latency_ms"]["host"]["p50_ci95"] = None
    assert only(compare(base.report, new.report, base.folder, new.folder)).verdict == "not comparable"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"row": "x"}',
        '{"row": "other/onnxruntime/int8/b1", "host_block_medians": [1]}',
        '{"row": "qat/onnxruntime/int8/b1", "host_block_medians": [0]}',
    ],
)
def test_damaged_samples_are_errors(tmp_path: Path, text: str) -> None:
    base, new = Run(tmp_path / "base", {"qat": 1.0}, 1), Run(tmp_path / "new", {"qat": 1.2}, 2)
    (new.folder / "samples/qat-onnxruntime-int8-b1.json").write_text(text)
    with pytest.raises(ArtifactError):
        compare(base.report, new.report, base.folder, new.folder)


def test_samples_outside_the_run_folder_are_not_read(tmp_path: Path) -> None:
    base, new = Run(tmp_path / "base", {"qat": 1.0}, 1), Run(tmp_path / "new", {"qat": 1.2}, 2)
    new.report["rows"][0]["samples"] = "../base/samples/qat-onnxruntime-int8-b1.json"
    with pytest.raises(ArtifactError, match="outside the run folder"):
        compare(base.report, new.report, base.folder, new.folder)


def test_accuracy_is_gated_even_where_latency_is_not_comparable(tmp_path: Path) -> None:
    base, new = Run(tmp_path / "base", {"qat": 1.0}, 1), Run(tmp_path / "new", {"qat": 1.0}, 2, top1=0.97)
    new.report["environment"]["cpu"]["model"] = "CPU B"
    result = compare(base.report, new.report, base.folder, new.folder, Gates(max_accuracy_drop=0.5))
    assert only(result).accuracy_change_pp == pytest.approx(-1.0)
    assert only(result).regressions == ("accuracy",)
    assert compare(base.report, new.report, base.folder, new.folder, Gates(max_accuracy_drop=1.5)).met


def test_a_row_that_failed_now_misses_the_gate(tmp_path: Path) -> None:
    base, new = Run(tmp_path / "base", {"qat": 1.0, "b": 1.0}, 1), Run(tmp_path / "new", {"qat": 1.0, "b": 1.0}, 2)
    new.report["rows"][0].update(status="failed", reason="SIGSEGV\n  → doctor")
    result = compare(base.report, new.report, base.folder, new.folder, Gates(max_latency_regression=0.05))
    assert result.rows[0].regressions == ("missing",)
    assert "SIGSEGV" in result.misses[0]


@settings(max_examples=25, deadline=None)
@given(base_ms=st.floats(0.01, 100), factor=st.floats(0.2, 5))
def test_swapping_the_runs_swaps_the_verdict(tmp_path_factory: pytest.TempPathFactory, base_ms: float, factor: float) -> None:
    folder = tmp_path_factory.mktemp("swap")
    a, b = Run(folder / "a", {"qat": base_ms}, 1), Run(folder / "b", {"qat": base_ms * factor}, 2)
    there, back = only(compare(a.report, b.report, a.folder, b.folder)), only(compare(b.report, a.report, b.folder, a.folder))
    assert there.ratio is not None
    assert back.ratio == pytest.approx(1 / there.ratio)
    opposite = {"faster": "slower", "slower": "faster", "same within noise": "same within noise"}
    if there.ratio_ci95 is not None and min(abs(end - 1) for end in there.ratio_ci95) > 0.003:  # resampling noise may tip an end that touches 1
        assert back.verdict == opposite[there.verdict]


@settings(max_examples=15, deadline=None)
@given(p50=st.floats(0.001, 1000), seed=st.integers(0, 10_000))
def test_a_run_against_itself_is_the_same(tmp_path_factory: pytest.TempPathFactory, p50: float, seed: int) -> None:
    run = Run(tmp_path_factory.mktemp("self") / "run", {"qat": p50}, seed)
    result = compare(run.report, copy.deepcopy(run.report), run.folder, run.folder, Gates(max_latency_regression=0.0, max_accuracy_drop=0.0))
    assert result.met
    assert only(result).verdict == "same within noise"
    assert only(result).ratio == 1.0


def test_json_and_renderers_tell_the_same(tmp_path: Path) -> None:
    base = Run(tmp_path / "base", {"a": 1.0, "b": 1.0, "gone": 1.0, "other": 1.0}, 1)
    new = Run(tmp_path / "new", {"a": 1.3, "b": 0.7, "other": 1.0, "<new>": 1.0}, 50)
    new.report["rows"][2]["threads"] = 8
    result = compare(base.report, new.report, base.folder, new.folder, Gates(max_latency_regression=0.05, max_accuracy_drop=0.5))
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert (data["gate"]["met"], len(data["gate"]["misses"])) == (False, 2)

    for width in (100, 80):
        console = Console(file=io.StringIO(), width=width)
        renderers.render_terminal(data, console)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert max(map(len, text.splitlines())) <= width
        assert text.startswith("REGRESSION a/onnxruntime/int8/b1")
        assert "threads: 2 → 8" in text
        for verdict in ("slower", "faster", "removed", "added", "not comparable"):
            assert verdict in text

    markdown = renderers.render_markdown(data)
    assert "❌" in markdown
    assert "<new>" not in markdown

    suite = ElementTree.fromstring(renderers.render_junit(data)).find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("5", "2", "2")


@pytest.mark.parametrize(
    ("gate", "change", "kind"),
    [
        ("max_throughput_regression", {"p50": 1.2}, "throughput"),
        ("max_memory_regression", {"peak_memory_bytes": 120_000_000}, "memory"),
        ("max_size_regression", {"artifact": {"bytes": 1_200_000}}, "size"),
    ],
)
def test_each_gate_misses_what_it_is_about(tmp_path: Path, gate: str, change: dict[str, Any], kind: str) -> None:
    base, new = Run(tmp_path / "base", {"qat": 1.0}, 1), Run(tmp_path / "new", {"qat": change.pop("p50", 1.0)}, 2)
    base.report["rows"][0] |= {"peak_memory_bytes": 100_000_000, "artifact": {"bytes": 1_000_000}}
    new.report["rows"][0] |= {"peak_memory_bytes": 100_000_000, "artifact": {"bytes": 1_000_000}, **change}
    result = compare(base.report, new.report, base.folder, new.folder, Gates(**{gate: 0.1}))
    assert only(result).regressions == (kind,)
    assert result.misses[0].startswith("qat/onnxruntime/int8/b1: ")
    assert compare(base.report, new.report, base.folder, new.folder, Gates(**{gate: 0.25})).met
    del base.report["rows"][0]["samples"], base.report["rows"][0]["peak_memory_bytes"], base.report["rows"][0]["artifact"]
    unknown = compare(base.report, new.report, base.folder, new.folder, Gates(**{gate: 0.25}))
    assert unknown.misses == (f"no row's {kind} could be compared, so the {kind} gate cannot be said to hold",)


def test_stored_repeats_widen_the_interval_to_what_lifetimes_differ_by(tmp_path: Path) -> None:
    base, new = Run(tmp_path / "base", {"qat": 1.0}, 1), Run(tmp_path / "new", {"qat": 1.06}, 2)
    blind = compare(base.report, new.report, base.folder, new.folder, Gates(max_latency_regression=0.02))
    assert only(blind).regressions == ("latency",)
    assert "no A/A repeats" in blind.notes[0]
    base.report["rows"][0]["noise"] = {"p50_ms": [1.0, 1.03, 0.98, 1.02, 0.97, 1.01, 0.99], "peak_memory_bytes": None, "same_rounds": [1.005, 0.996, 1.002]}
    calibrated = compare(base.report, new.report, base.folder, new.folder, Gates(max_latency_regression=0.02))
    row = only(calibrated)
    assert (row.verdict, row.interval_from) == ("same within noise", "block medians and A/A repeats")
    assert calibrated.met
    assert calibrated.notes == []
    assert row.noise_floor == pytest.approx(0.0772, abs=2e-3)  # 2.447 · s · √2
    assert row.noise_floor_same_rounds is not None
    assert row.noise_floor_same_rounds < row.noise_floor  # two lifetimes in the same rounds share the machine's mood
    assert "±7" in renderers.noise_sentence(calibrated.to_json())


def test_the_memory_gate_holds_that_on_the_gpu_too(tmp_path: Path) -> None:
    base, new = Run(tmp_path / "base", {"qat": 1.0}, 1), Run(tmp_path / "new", {"qat": 1.0}, 2)
    base.report["rows"][0] |= {"peak_memory_bytes": 100, "device_memory_bytes": 1000}
    new.report["rows"][0] |= {"peak_memory_bytes": 100, "device_memory_bytes": 1090}
    assert compare(base.report, new.report, base.folder, new.folder, Gates(max_memory_regression=0.1)).met
    found = compare(base.report, new.report, base.folder, new.folder, Gates(max_memory_regression=0.08))
    assert only(found).regressions == ("memory",)
    assert "1.09x the memory on the GPU, more than 8 % above the base" in found.misses[0]


def test_memory_has_a_noise_floor_of_its_own(tmp_path: Path) -> None:
    base, new = Run(tmp_path / "base", {"qat": 1.0}, 1), Run(tmp_path / "new", {"qat": 1.0}, 2)
    base.report["rows"][0] |= {"peak_memory_bytes": 100, "noise": {"p50_ms": [1.0, 1.0, 1.0], "peak_memory_bytes": [100, 104, 97], "same_rounds": [1.0]}}
    new.report["rows"][0]["peak_memory_bytes"] = 115
    assert compare(base.report, new.report, base.folder, new.folder, Gates(max_memory_regression=0.1)).met
    del base.report["rows"][0]["noise"]
    assert not compare(base.report, new.report, base.folder, new.folder, Gates(max_memory_regression=0.1)).met


def test_figures_measured_again_replace_stored_ones_and_conditions(tmp_path: Path) -> None:
    base, new = Run(tmp_path / "base", {"a": 1.0, "b": 1.0}, 1), Run(tmp_path / "new", {"a": 1.0, "b": 1.0}, 2)
    new.report["environment"]["cpu"]["model"] = "CPU B"
    again: dict[str, Reran | str] = {
        "a/onnxruntime/int8/b1": Reran(2.0, 2.2, Ratio(1.1, 1.08, 1.12), Ratio(0.91, 0.9, 0.92), None, 5),
        "b/onnxruntime/int8/b1": "new: it was ended by SIGSEGV",
    }
    result = compare(base.report, new.report, base.folder, new.folder, Gates(max_latency_regression=0.05), reran=again)
    assert [(r.verdict, r.regressions) for r in result.rows] == [("slower", ("latency",)), ("not comparable", ("missing",))]
    assert (result.rows[0].base_p50_ms, result.rows[0].ratio_ci95, result.rows[0].interval_from) == (2.0, (1.08, 1.12), "process lifetimes")
    assert "SIGSEGV" in result.misses[1]
    assert result.environment["cpu"]["model"] != "CPU B"
    assert "measured again with synthetic 1/f noise" in renderers.render_markdown(result.to_json())
    with_images = compare(base.report, new.report, base.folder, new.folder, reran=again, images="test images of digits")
    assert with_images.notes == ["measured again with test images of digits"]
    new.report["rows"][0].update(status="failed", reason="its outputs are NaN or infinite")  # fast, and useless
    failed = compare(base.report, new.report, base.folder, new.folder, Gates(max_latency_regression=0.5), reran=again)
    assert failed.rows[0].regressions == ("missing",)
    assert "NaN" in failed.misses[0]


def told(result: Comparison) -> tuple[str, str, str]:
    """Of all three renderers, on one line each."""
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    console = Console(file=io.StringIO(), width=1000)
    renderers.render_terminal(data, console)
    return console.file.getvalue(), renderers.render_markdown(data), renderers.render_junit(data)  # type: ignore[attr-defined]


WIDE = Ratio(1.0, 0.9, 1.12)


@pytest.mark.parametrize(
    ("gates", "figures", "said"),
    [
        ({"max_latency_regression": 0.02}, (WIDE, Ratio(1, 0.99, 1.01)), "the interval reaches 12.0 % slower: a regression beyond 2 % can't be ruled out"),
        (
            {"max_throughput_regression": 0.05},
            (Ratio(1, 0.99, 1.01), WIDE),
            "the interval reaches 10.0 % less throughput: a regression beyond 5 % can't be ruled out",
        ),
    ],
)
def test_an_interval_that_reaches_beyond_a_gate_passes_and_is_told(tmp_path: Path, gates: dict[str, float], figures: tuple[Ratio, Ratio], said: str) -> None:
    base, new = Run(tmp_path / "base", {"a": 1.0}, 1), Run(tmp_path / "new", {"a": 1.0}, 2)
    again: dict[str, Reran | str] = {"a/onnxruntime/int8/b1": Reran(1.0, 1.0, *figures, None, 9)}
    result = compare(base.report, new.report, base.folder, new.folder, Gates(**gates), reran=again)
    (kind,) = (name.split("_")[1] for name in gates)
    assert (result.met, only(result).undecided, only(result).regressions) == (True, (kind,), ())
    assert only(result).why == f"{said} (9 lifetimes)"
    for text in told(result):
        assert said in text.replace("&#39;", "'")
    assert "; the interval of 1 row reaches beyond it" in renderers.gate_sentence(result.to_json())
    looser = compare(base.report, new.report, base.folder, new.folder, Gates(**dict.fromkeys(gates, 0.12)), reran=again)
    assert (only(looser).undecided, only(looser).why) == ((), "")
    assert "reaches" not in renderers.gate_sentence(looser.to_json())
    assert only(compare(base.report, new.report, base.folder, new.folder, reran=again)).why == ""  # no gate was asked for


def test_a_missed_gate_is_not_undecided(tmp_path: Path) -> None:
    row = only(compared(tmp_path, 1.0, 1.2, max_latency_regression=0.02))
    assert (row.regressions, row.undecided) == (("latency",), ())


def test_rows_that_could_not_be_compared_are_counted_in_the_gate(tmp_path: Path) -> None:
    base, new = Run(tmp_path / "base", {"a": 1.0, "b": 1.0, "c": 1.0}, 1), Run(tmp_path / "new", {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}, 9)
    new.report["rows"][1]["threads"] = 8
    gates = Gates(max_latency_regression=0.3)
    result = compare(base.report, new.report, base.folder, new.folder, gates)
    assert result.met
    assert renderers.gate_sentence(result.to_json()) == "gate met for 2 of 3 rows (at most 30 % slower); 1 could not be compared"  # nothing is held of d, new
    by_accuracy = compare(base.report, new.report, base.folder, new.folder, Gates(max_accuracy_drop=0.5))
    assert renderers.gate_sentence(by_accuracy.to_json()) == "gate met (at most 0.5 pp less accurate)"  # other threads do not change that
    new.report["rows"][0]["status"] = "failed"
    missed = compare(base.report, new.report, base.folder, new.folder, gates)
    assert renderers.gate_sentence(missed.to_json()) == "gate MISSED (at most 30 % slower); 2 of 3 rows could not be compared"


def test_figures_measured_again_come_with_how(tmp_path: Path) -> None:
    base, new = (Run(tmp_path / name, {"a": 1.0, "b": 1.0}, seed) for seed, name in enumerate(("base", "new")))
    figures = (1.0, 1.0, Ratio(1, 0.99, 1.01), Ratio(1, 0.99, 1.01), None)
    again: dict[str, Reran | str] = {
        "a/onnxruntime/int8/b1": Reran(*figures, 5, threads=2, ran_on="cpu"),
        "b/onnxruntime/int8/b1": Reran(*figures, 10, threads=2, ran_on="cpu"),
    }
    result = compare(base.report, new.report, base.folder, new.folder, reran=again, plan=Plan(precision=0.005, seconds=2.0), images="test images of digits")
    found = result.to_json()
    assert [(r["lifetimes"], r["threads"], r["device"]) for r in found["rows"]] == [(5, 2, "cpu"), (10, 2, "cpu")]
    assert found["rerun"] == {"lifetimes": 5, "precision": 0.005, "budget_s": 60.0, "seconds": 2.0, "threads": None, "images": "test images of digits"}
    versions = found["environment"]["versions"]
    assert {"deployopt", "onnxruntime", "onnxruntime-gpu"} <= versions.keys()
    assert "openvino" not in versions  # no row runs on it
    for text in told(result)[:2]:
        assert "5–10 lifetimes of both processes, 2 threads on cpu" in text
        assert f"numpy {np.__version__}" in text
    stored = compare(base.report, new.report, base.folder, new.folder).to_json()
    assert (stored["rerun"], stored["rows"][0]["lifetimes"]) == (None, None)


def test_only_chosen_rows_are_compared(tmp_path: Path) -> None:
    base, new = Run(tmp_path / "base", {"a": 1.0, "b": 1.0}, 1), Run(tmp_path / "new", {"a": 1.0, "b": 1.0}, 2)
    assert only(compare(base.report, new.report, base.folder, new.folder, only=["b/onnxruntime/int8/b1"])).key == "b/onnxruntime/int8/b1"
    with pytest.raises(UsageError, match="did you mean 'b/onnxruntime/int8/b1'"):
        compare(base.report, new.report, base.folder, new.folder, only=["b/onnxrutime/int8/b1"])


def test_other_recipes_tasks_and_data(tmp_path: Path) -> None:
    base, new = Run(tmp_path / "base", {"qat": 1.0}, 1), Run(tmp_path / "new", {"qat": 1.0}, 2)
    base.report["recipe"] = {"name": "r", "data": {"name": "digits"}, "stages": [{"qat": {"epochs": 2}}]}
    new.report["recipe"] = {"name": "r", "data": {"name": "cifar10"}, "stages": [{"qat": {"epochs": 3}}]}
    result = compare(base.report, new.report, base.folder, new.folder)
    assert result.recipe_changes == ["data.name: digits → cifar10", "stages[0].qat.epochs: 2 → 3"]
    assert only(result).accuracy_change_pp is None
    assert result.notes[-1] == "accuracy is not compared: the runs were scored on other data"
    new.report["recipe"]["name"] = "s"
    with pytest.raises(UsageError, match="one recipe, found 'r' and 's'"):
        compare(base.report, new.report, base.folder, new.folder)
    new.report["recipe"]["name"] = "r"
    new.report["task"] = {"name": "regression", "primary": "mae", "unit": "px", "higher_is_better": False}
    with pytest.raises(UsageError, match="one metric, found top1 and mae"):
        compare(base.report, new.report, base.folder, new.folder)


def test_an_offline_row_is_judged_by_its_throughput(tmp_path: Path) -> None:
    base, new = (offline(Run(tmp_path / name, {"qat": 1.0}, 0), throughput) for name, throughput in (("base", 1000.0), ("new", 1200.0)))
    result = compare(base.report, new.report, base.folder, new.folder, Gates(max_latency_regression=0.0, max_throughput_regression=0.05))
    row = only(result)
    assert (row.verdict, row.judged_by, row.regressions) == ("faster", "throughput", ())
    assert row.ratio is not None
    assert row.ratio > 1.1  # of latencies under load
    assert "throughput 1.2" in renderers.render_markdown(result.to_json())
    (new.folder / new.report["rows"][0]["samples"]).unlink()
    alone = only(compare(base.report, new.report, base.folder, new.folder))
    assert (alone.verdict, alone.why) == ("not comparable", "the throughput of its blocks is not stored, and an offline row is judged by that")


def test_the_device_clock_has_a_ratio_where_both_runs_have_one(tmp_path: Path) -> None:
    base, new = (Run(tmp_path / name, {"qat": 1.0}, seed) for seed, name in enumerate(("base", "new")))
    assert only(compare(base.report, new.report, base.folder, new.folder)).device_ratio is None
    for run, p50 in ((base, 0.5), (new, 0.6)):
        file = run.folder / run.report["rows"][0]["samples"]
        file.write_text(json.dumps({**json.loads(file.read_text()), "device_block_medians": blocks(p50, 5)}))
    found = compare(base.report, new.report, base.folder, new.folder).to_json()["rows"][0]
    assert found["device_ratio"] == pytest.approx(1.2, rel=0.01)
    assert found["device_ratio_ci95"][0] < found["device_ratio"] < found["device_ratio_ci95"][1]
    assert found["verdict"] == "same within noise"  # goes by the host's clock
