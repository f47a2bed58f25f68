"""Engines and sessions on a GPU: built, verified, held to ONNX Runtime's outputs, timed. `benchmarks/README.md` says what it needs.

    python benchmarks/gpu.py prepare                     # here, with torch and no GPU: about 15 minutes; fills runs/gpu-models (50 MB to carry)
    python benchmarks/gpu.py unpack --dialect tensorrt8    # there, with onnx: the files of each precision; --dialect canonical for all but TensorRT 8.x
    python3.10 benchmarks/gpu.py trt86                   # there, NumPy alone: TensorRT 8.6, or what is installed: FP32 to INT8+FP16 at batch 1, 8 and 64
    python benchmarks/gpu.py rtx | torch | ort           # there: TensorRT-RTX, PyTorch eager and compiled, ONNX Runtime's CUDA and TensorRT providers

Each run ends within --minutes; what is measured by then is stored, and the same command goes on where it stopped. Writes <out>/<gpu>/<subcommand>.json
and .md (trt86's are named by TensorRT's version), and prints a short table last. Exit code 1 means that something is left to do.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from _gpu_measure import OPEN_AT_ONCE, Clock, Session, Subject, agreement, measure, sessions, speedup
from _gpu_rows import (
    ARCHS,
    BATCH_SIZES,
    PRECISIONS,
    SAMPLES,
    VARIANTS,
    Results,
    Samples,
    machine,
    made_of,
    path_of,
    ratio_of,
    read_samples,
    row_table,
    short_failures,
    short_table,
    table,
)

from deployopt.errors import BackendUnavailable, DeployoptError, StageFailed
from deployopt.runtime.child import run_in_child
from deployopt.runtime.cuda import find_gpu
from deployopt.runtime.manifest import path_of as manifest_of
from deployopt.runtime.progress import SilentProgress
from deployopt.runtime.session import SessionOptions
from deployopt.runtime.tensorrt import BuildOptions, compute_capabilities, ranges_of
from deployopt.runtime.tensorrt_vendor import load_vendor
from deployopt.runtime.tensorrt_versions import is_rtx, is_weakly_typed, release

ROOT = Path(__file__).resolve().parents[1]
MODELS, OUT = ROOT / "runs" / "gpu-models", ROOT / "benchmarks" / "results"
MINUTES = 7.5
GROUP_S, BUILD_S, CHECK_S = 100.0, 20.0, 40.0  # no group, build or check of the harness is begun with less left
LISTING_S = 60.0
OWN_KERNELS = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")  # the packed 8.6 has no cuBLAS and no cuDNN
CHECKED, CHECK_ROUNDS, CHECK_RUNS, CHECK_LOOPS_S = ("fp32", "int8"), 40, 100, 15.0  # on the first dense network; fewer runs a round where they take longer
OPTIONS: dict[str, dict[str, Any]] = {  # of a build that nothing else here asks for: each is tried once
    "workspace_mib": {"workspace_mib": 256},
    "optimization_level": {"optimization_level": 1},
    "error_on_timing_cache_miss": {"error_on_timing_cache_miss": True},  # what the same build timed before is in the cache
}
REFERENCE = {"fp32": "fp32", "fp16": "fp32", "int8": "int8", "int8_fp16": "int8"}
VARIATIONS: dict[str, dict[str, Any]] = {"": {}, "+graph": {"cuda_graph": True}}  # of how an engine is opened; TensorRT-RTX has no graphs yet
TORCH = {  # (precision, channels_last, mode of torch.compile)
    "eager-fp32": ("fp32", False, None),
    "eager-fp16": ("fp16", False, None),
    "eager-fp16-channels_last": ("fp16", True, None),
    "compile-fp16-channels_last": ("fp16", True, "default"),
    "compile-fp16-channels_last-graphs": ("fp16", True, "reduce-overhead"),
}


class Rows:
    """Sessions timed in groups of one architecture and batch size, each row stored with how far its outputs are from ONNX Runtime's."""

    at_once = OPEN_AT_ONCE

    def __init__(self, results: Results, samples: Samples, clock: Clock) -> None:
        self.results, self.samples, self.clock = results, samples, clock

    def missing(self, arch: str) -> list[int]:
        """Batch sizes that are left to do."""
        return [batch for batch in BATCH_SIZES if f"group:{arch}:b{batch}" not in self.results]

    def take(self, arch: str, subjects: Sequence[Subject], baseline: str) -> bool:
        """Time the groups that are missing. False if the time ran out.

        Args:
            baseline: key of the subject that speed-ups are relative to.
        """
        if self.clock.left_s() < GROUP_S:
            return False
        failures: dict[str, str] = {}
        with sessions(subjects, failures, self.at_once) as live:
            for batch in self.missing(arch):
                if self.clock.left_s() < GROUP_S:
                    return False
                measured = measure({key: session for key, session in live.items() if key not in failures}, self.samples.images, batch, failures)
                outputs = {key: self._agreement(key, live[key], batch, failures) for key in measured}
                for subject in [subject for subject in subjects if subject.key in measured and subject.key not in failures]:
                    found = measured[subject.key]
                    faster = list(speedup(measured[baseline], found)) if baseline in measured else None
                    facts = {"outputs": outputs[subject.key], "speedup": faster, "made_of": made_of(subject.path)}
                    self.results.keep(f"row:{subject.key}:b{batch}", {**found, **facts})
                for key, reason in failures.items():
                    self.results.keep(f"row:{key}:b{batch}", {"failed": reason})
                self.results.keep(f"group:{arch}:b{batch}", {"rows": len(measured), "machine": machine()})
        return True

    def _agreement(self, key: str, session: Session, batch: int, failures: dict[str, str]) -> dict[str, Any] | None:
        network, _, precision = key.partition("+")[0].rpartition("-")
        reference = self.samples.references.get(f"{network}-{REFERENCE.get(precision)}")
        if reference is None:
            return None
        try:
            outputs = session.outputs(self.samples.images, batch)
        except DeployoptError as exc:
            failures[key] = exc.message
            return None
        if not np.isfinite(outputs).all():
            failures[key] = f"its outputs are NaN or infinite for batches of {batch}"
            return None
        return agreement(outputs, reference, self.samples.targets)

    def tables(self) -> str:
        return row_table(self.results.done("row:"))

    def short(self) -> str:
        """What a terminal shows; the rest is in the summary."""
        return short_table(self.results.done("row:")) + short_failures(self.results.failures())


class Engines(Rows):
    """Engines of one vendor's library: built once a machine, opened with and without a CUDA graph."""

    def __init__(self, vendor: str, arguments: argparse.Namespace, clock: Clock) -> None:
        trt, gpu = load_vendor(vendor), find_gpu()
        if is_rtx(trt) and gpu.compute_capability not in compute_capabilities(trt):
            raise BackendUnavailable(
                f"TensorRT-RTX {trt.__version__} does not serve {gpu.name} (compute capability {gpu.compute_capability}; "
                f"it serves {', '.join(compute_capabilities(trt))})",
                "run it on a GPU of one of these",
            )
        name = "rtx" if is_rtx(trt) else "trt" + "".join(map(str, release(trt)))
        super().__init__(Results(arguments.out, name, gpu.name, f"{vendor} {trt.__version__}"), read_samples(arguments.models / SAMPLES), clock)
        self._archs: list[str] = arguments.archs
        self._vendor, self._models = vendor, arguments.models
        self._onnx = arguments.models / ("tensorrt8" if is_weakly_typed(trt) else "canonical")
        self._variations = {"": VARIATIONS[""]} if is_rtx(trt) else VARIATIONS
        self._options = {} if is_rtx(trt) else OPTIONS
        self._engines = arguments.models / f"engines-{vendor}-{trt.__version__}-{gpu.compute_capability}"
        self._timing_cache = None if is_rtx(trt) else str(self._engines)
        self._tactic_sources = OWN_KERNELS if is_weakly_typed(trt) else None
        self._engines.mkdir(exist_ok=True)

    def run(self) -> bool:
        """Do what is left to do, the harness's check and the options' after the first architecture. False if the time ran out."""
        first, *others = self._archs
        return self._architecture(first) and self._check_harness(first) and self._try_options(first) and all(self._architecture(arch) for arch in others)

    def _architecture(self, arch: str) -> bool:
        if not self.missing(arch):
            return True
        subjects: list[Subject] = []
        for variant, precision in ((v, p) for v in VARIANTS for p in PRECISIONS):
            if self.clock.left_s() < BUILD_S:
                return False
            if self._build(arch, variant, precision):
                subjects += self._subjects(arch, variant, precision)
        return self.take(arch, subjects, f"{arch}-dense-fp32")

    def _build(self, arch: str, variant: str, precision: str) -> bool:
        """Whether there is an engine. One that could not be built is not tried again, but with --retry."""
        source, engine = path_of(self._onnx, arch, variant, precision), self._engine(arch, variant, precision)
        key = f"build:{source.stem}"
        if key in self.results and ("failed" in self.results[key] or manifest_of(engine).exists()):
            return "failed" not in self.results[key]
        built = self._build_file(key, source, engine, precision, {})  # also where the engine was built, and the run killed before it said so
        if built is None:
            return False
        self._keep_listing(engine)
        self.results.keep(key, {**built, **made_of(engine), "bytes": engine.stat().st_size})
        print(key, f"{built['seconds']:.0f} s", built["execution"] or built["reason"], flush=True)
        return True

    def _build_file(self, key: str, source: Path, engine: Path, precision: str, options: dict[str, Any]) -> dict[str, Any] | None:
        """Facts of a build; None if it failed, which is kept under `key`, or if the time ran out."""
        asked = BuildOptions(BATCH_SIZES, timing_cache=self._timing_cache, tactic_sources=self._tactic_sources)._replace(**options)
        request = {
            "vendor": self._vendor,
            "onnx": str(source),
            "engine": str(engine),
            "precision": precision,
            "device": "cuda",
            "options": asked.to_json(),
            "preprocessing": None,
        }
        limit_s = self.clock.left_s()
        try:
            built: dict[str, Any] = run_in_child("deployopt.runtime.tensorrt:build_file", request, SilentProgress(), f"building {engine.name}", limit_s)
        except DeployoptError as exc:
            if self.clock.left_s() > 0:  # else it was ended for the lack of time, and says nothing
                self.results.keep(key, {"failed": str(exc)})
                print(key, exc, flush=True)
            return None
        return built

    def _try_options(self, arch: str) -> bool:
        """An engine of its own with each option, which is not timed. False if the time ran out."""
        for name, options in self._options.items():
            key, engine = f"option:{arch}-{name}", self._engines / f"{arch}-{name}.engine"
            if key in self.results:
                continue
            if self.clock.left_s() < BUILD_S:
                return False
            built = self._build_file(key, path_of(self._onnx, arch, "dense", "fp32"), engine, "fp32", options)
            if built is None and key not in self.results:
                return False
            if built is not None:
                self.results.keep(key, built)
                engine.unlink()
                manifest_of(engine).unlink()
        return True

    def _keep_listing(self, engine: Path) -> None:
        """What the inspector says of the engine, whole, in a zip beside the results: they hold only what was read from it."""
        given = {"vendor": self._vendor, "engine": str(engine)}
        try:
            listing = run_in_child("_gpu_sessions:listing", given, SilentProgress(), f"inspecting {engine.name}", LISTING_S)
        except DeployoptError as exc:
            listing = str(exc)
        with zipfile.ZipFile(self.results.path.with_name(f"{self.results.path.stem}-inspector.zip"), "a", zipfile.ZIP_DEFLATED) as stored:
            stored.writestr(f"{engine.stem}.json", listing)

    def _engine(self, arch: str, variant: str, precision: str) -> Path:
        return path_of(self._engines, arch, variant, precision, ".engine")

    def _subjects(self, arch: str, variant: str, precision: str) -> list[Subject]:
        engine, opener = self._engine(arch, variant, precision), f"_gpu_sessions:open_{self._vendor}"
        return [Subject(f"{engine.stem}{suffix}", opener, engine, SessionOptions(1, "cuda", precision, extra)) for suffix, extra in self._variations.items()]

    def _check_harness(self, arch: str) -> bool:
        """The harness against a bare CUDA-event loop, and an engine against itself."""
        for precision, batch in ((p, b) for p in CHECKED for b in BATCH_SIZES):
            key = f"check:{arch}-dense-{precision}:b{batch}"
            if key in self.results:
                continue
            if self.clock.left_s() < CHECK_S:
                return False
            if self._build(arch, "dense", precision):
                try:
                    self.results.keep(key, {**self._bare(arch, precision, batch), **self._itself(arch, precision, batch)})
                except DeployoptError as exc:
                    if self.clock.left_s() <= 0:
                        return False
                    self.results.keep(key, {"failed": str(exc)})
        return True

    def _bare(self, arch: str, precision: str, batch: int) -> dict[str, Any]:
        engine = self._engine(arch, "dense", precision)
        given = {"vendor": self._vendor, "engine": str(engine), "samples": str(self._models / SAMPLES)}
        extent = {"batch": batch, "rounds": CHECK_ROUNDS, "most_runs": CHECK_RUNS, "seconds": CHECK_LOOPS_S}
        target, limit_s = "_gpu_sessions:compare_with_bare_loop", self.clock.left_s()
        found: dict[str, Any] = run_in_child(target, {**given, **extent}, SilentProgress(), f"timing {engine.name}", limit_s)
        return found

    def _itself(self, arch: str, precision: str, batch: int) -> dict[str, Any]:
        one = self._subjects(arch, "dense", precision)[0]
        failures: dict[str, str] = {}
        with sessions([one, one._replace(key="again")], failures) as live:
            twice = measure(live, self.samples.images, batch, failures)
        if failures:
            raise StageFailed("; ".join(failures.values()))
        return {"aa": list(speedup(twice[one.key], twice["again"]))}

    def tables(self) -> str:
        built = self.results.done("build:")
        engines = [(key, *_execution(entry), f"{entry['bytes'] / 1e6:.1f}", f"{entry['seconds']:.0f}") for key, entry in built.items()]
        header = "engine", "INT8 layers", "by precision", "Adds fused", "unfused", "reformats", "MB", "build s"
        return "\n".join((table(header, engines), super().tables(), self._checks()))

    def short(self) -> str:
        return f"{super().short()}\n{self._checks()}"

    def _checks(self) -> str:
        checks, tried = self.results.done("check:"), self.results.done("option:")
        compared = [(key, ratio_of(entry["ratio"]), ratio_of(entry["aa"])) for key, entry in checks.items()]
        options = [(key, f"{entry['seconds']:.0f}", entry["timing_cache"] or "") for key, entry in tried.items()]
        return "\n".join(
            (table(("engine, batch", "harness / bare loop", "A/A"), compared), table(("built with the option", "build s", "timing cache"), options))
        )


class Loaders(Rows):
    """Sessions of a runtime that builds nothing, by architecture; the first of each is the baseline."""

    def __init__(self, runtime: str, subjects: dict[str, list[Subject]], arguments: argparse.Namespace, clock: Clock) -> None:
        results = Results(arguments.out, arguments.subcommand, find_gpu().name, runtime)
        super().__init__(results, read_samples(arguments.models / SAMPLES), clock)
        self._subjects = subjects

    def run(self) -> bool:
        return all(self.take(arch, subjects, subjects[0].key) for arch, subjects in self._subjects.items() if self.missing(arch))


def _execution(entry: dict[str, Any]) -> tuple[str, str, str, str, str]:
    ran = entry["execution"]
    if ran is None:
        return ("?", entry["reason"], "?", "?", "?")
    executed = ", ".join(f"{count} {precision}" for precision, count in sorted(ran["executed"].items()))
    quantized, adds = f"{ran['quantized_layers']}/{ran['quantizable_layers']}", f"{ran['fused_adds']}/{ran['adds']}"
    return (quantized, executed, adds, str(ran["int8_to_float"]), str(ran["reformats"]))


def torch_rows(arguments: argparse.Namespace, clock: Clock) -> Loaders:
    """Dense networks only: for orientation, as PyTorch's users run them."""

    def subject(arch: str, name: str) -> Subject:
        precision, channels_last, mode = TORCH[name]
        extra = {"arch": arch, "channels_last": channels_last, "mode": mode}
        return Subject(f"{arch}-{name}", "_gpu_sessions:open_torch", arguments.models / arch, SessionOptions(1, "cuda", precision, extra))

    return Loaders(f"torch {version('torch')}", {arch: [subject(arch, name) for name in TORCH] for arch in arguments.archs}, arguments, clock)


def ort_rows(arguments: argparse.Namespace, clock: Clock) -> Loaders:
    """The CUDA provider's float networks (it has no INT8 convolution), and the TensorRT provider's. Where that is lacking, its rows fail with the reason."""
    from deployopt.runtime.onnxruntime_gpu import CUDA, PROFILE, TENSORRT, require
    from deployopt.runtime.onnxruntime_session import load_vendor, open_unoptimized

    require(CUDA)

    def subject(arch: str, variant: str, precision: str, provider: str) -> Subject:
        path, extra = path_of(arguments.models / "canonical", arch, variant, precision), {"provider": provider}
        if provider == CUDA:
            return Subject(path.stem, "_gpu_sessions:open_onnxruntime", path, SessionOptions(1, "cuda", precision, extra))
        with open_unoptimized(path) as described:
            profile = ranges_of(described.inputs, BATCH_SIZES)
        return Subject(f"{path.stem}+tensorrt", "_gpu_sessions:open_onnxruntime", path, SessionOptions(1, "cuda", precision, {**extra, PROFILE: profile}))

    offered = [*((CUDA, precision) for precision in ("fp32", "fp16")), *((TENSORRT, precision) for precision in ("fp32", "fp16", "int8_fp16"))]
    subjects = {arch: [subject(arch, variant, precision, provider) for variant in VARIANTS for provider, precision in offered] for arch in arguments.archs}
    rows = Loaders(f"onnxruntime {load_vendor().__version__}", subjects, arguments, clock)
    rows.at_once = 1  # the TensorRT provider builds its engines
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subcommand", choices=("prepare", "unpack", "trt86", "rtx", "torch", "ort"))
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of the networks")
    parser.add_argument("--archs", nargs="+", choices=ARCHS, default=list(ARCHS), help="these only, in this order")
    parser.add_argument("--dialect", choices=("canonical", "tensorrt8"), default="tensorrt8", help="unpack: in this one")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which nothing new is begun")
    parser.add_argument("--retry", action="store_true", help="try again what failed")
    arguments = parser.parse_args()
    try:
        return _run(arguments)
    except DeployoptError as exc:
        print(f"{arguments.subcommand}: {exc}", file=sys.stderr)
        return exc.exit_code


def _run(arguments: argparse.Namespace) -> int:
    if arguments.subcommand == "prepare":
        from _gpu_prepare import prepare

        prepare(arguments.models, arguments.archs)
        return 0
    if arguments.subcommand == "unpack":
        from _gpu_models import unpack

        print(*(path.name for path in unpack(arguments.models, arguments.dialect)), sep="\n")
        return 0
    clock = Clock(arguments.minutes)
    if arguments.subcommand == "trt86":
        work: Engines | Loaders = Engines("tensorrt", arguments, clock)
    elif arguments.subcommand == "rtx":
        work = Engines("tensorrt_rtx", arguments, clock)
    else:
        work = torch_rows(arguments, clock) if arguments.subcommand == "torch" else ort_rows(arguments, clock)
    if arguments.retry:
        work.results.forget_failures()
    whole = work.run()
    work.results.write_summary(work.tables())
    print(work.short())
    print(work.results.path.with_suffix(".md"), "has the rest")
    print("all done" if whole else "time ran out: the same command goes on")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
