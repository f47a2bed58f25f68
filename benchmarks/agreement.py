"""Do we measure what others measure? Our median against OpenVINO's `benchmark_app` and bare loops over one file, at matched settings.

    python benchmarks/agreement.py                       # about 9 minutes
    python benchmarks/agreement.py --rounds 3 --seconds 1

OpenVINO: our harness, its `benchmark_app` (synchronous API) and a bare loop of `infer`; ONNX Runtime: our harness and a bare loop of `session.run`.
All with one stream, one thread (nothing that wants the other core disturbs one of them alone), FP32 and one image over and over (as the other two do;
`bench` rotates eight), each in a process of its own, in a new random order in every round. Each round gives one ratio; told is their median, which a
burst of other work in one of them does not move, with a bootstrap interval. The network's weights are random: speed does not depend on them. Writes
benchmarks/results/agreement.json; exits with 1 where a ratio is further than 2 % from 1.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from deployopt.bench.disturbance import Limits
from deployopt.bench.environment import environment
from deployopt.bench.harness import Measured, Settings, Subject, measure
from deployopt.bench.images import natural_noise
from deployopt.bench.targets import opener
from deployopt.runtime.clock import now_ns, seconds_since
from deployopt.runtime.preprocessing import to_feed
from deployopt.runtime.progress import SilentProgress
from deployopt.runtime.session import SessionOptions
from deployopt.runtime.statistics import Ratio, bootstrap_ratio

RESULTS = Path(__file__).resolve().parent / "results"
LIMIT = 0.02
WARM_UP_S = 1.0
# as its console script does, without the import that reports to its maker's analytics
BENCHMARK_APP = "import sys; sys.modules['openvino_telemetry'] = None; from openvino.tools.benchmark.main import main; main()"
ANY = Limits(*[float("inf")] * 6)  # a disturbed round disturbs all tools of it; their ratio is what counts


def ours(backend: str, model: Path, size: int, threads: int, seconds: float) -> float:
    """Median in ms of `deployopt bench`'s harness."""
    subject = Subject("ours", opener(backend), model, SessionOptions(threads))
    result = measure([subject], natural_noise(1, size, size, 3, seed=0), Settings(min_seconds=seconds, limits=ANY, buffers=1), SilentProgress())["ours"]
    if not isinstance(result, Measured):
        raise RuntimeError(result.reason)
    return float(result.host["p50"])


def benchmark_app(model: Path, size: int, threads: int, seconds: float) -> float:
    """Median in ms of OpenVINO's own tool."""
    with TemporaryDirectory() as folder:
        settings = {"-hint": "none", "-nstreams": 1, "-nthreads": threads, "-infer_precision": "f32", "-api": "sync", "-t": max(1, round(seconds))}
        shape = {"-data_shape": f"[1,3,{size},{size}]", "-inference_only": "true"}
        report = {"-report_type": "no_counters", "-report_folder": folder, "-json_stats": "true"}
        flags = [str(word) for pair in {"-m": model, "-d": "CPU", **settings, **shape, **report}.items() for word in pair]
        done = subprocess.run([sys.executable, "-c", BENCHMARK_APP, *flags], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"benchmark_app failed: {(done.stdout + done.stderr)[-2000:]}")
        (written,) = Path(folder).glob("*.json")
        return float(json.loads(written.read_text())["execution_results"]["latency (ms)"])


def bare(backend: str, model: Path, size: int, threads: int, seconds: float) -> float:
    """Median in ms of a loop as anyone would write it, in a process of its own."""
    command = [sys.executable, __file__, "--bare", backend, str(model), str(size), str(threads), str(seconds)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def bare_loop(backend: str, model: Path, size: int, threads: int, seconds: float) -> float:
    """Median in ms of runs over one feed, after a second of warm-up. Nothing of ours but the feed: a wrong setting of our sessions would be theirs too."""
    feed = to_feed(natural_noise(1, size, size, 3, seed=0))
    run: Callable[[], object]
    if backend == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def run() -> object:
            return session.run(None, {name: feed})
    else:
        import openvino

        properties = {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        request = openvino.compile_model(str(model), "CPU", properties).create_infer_request()
        request.set_input_tensor(openvino.Tensor(feed, shared_memory=True))
        run = request.infer
    start = now_ns()
    while seconds_since(start) < WARM_UP_S:
        run()
    durations: list[int] = []
    start = now_ns()
    while seconds_since(start) < seconds:
        before = now_ns()
        run()
        durations.append(now_ns() - before)
    return float(np.median(durations)) * 1e-6


def rounds(model: Path, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Medians in ms by tool, one for each round."""
    size, threads, seconds = arguments.image_size, arguments.threads, arguments.seconds
    tools: dict[str, Callable[[], float]] = {
        "openvino": lambda: ours("openvino", model, size, threads, seconds),
        "openvino benchmark_app": lambda: benchmark_app(model, size, threads, seconds),
        "openvino bare loop": lambda: bare("openvino", model, size, threads, seconds),
        "onnxruntime": lambda: ours("onnxruntime", model, size, threads, seconds),
        "onnxruntime bare loop": lambda: bare("onnxruntime", model, size, threads, seconds),
    }
    order, found = random.Random(0), {name: [] for name in tools}  # type: tuple[random.Random, dict[str, list[float]]]
    for number in range(arguments.rounds):
        for name in order.sample(list(tools), len(tools)):
            found[name].append(tools[name]())
        print(f"round {number + 1} of {arguments.rounds}:", {name: round(values[-1], 3) for name, values in found.items()}, flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=2.0, help="timed by each tool in each round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bare", nargs=5, metavar=("BACKEND", "MODEL", "SIZE", "THREADS", "SECONDS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        backend, model, size, threads, seconds = arguments.bare
        print(bare_loop(backend, Path(model), int(size), int(threads), float(seconds)))
        return 0
    import _networks

    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        made, _ = _networks.network(arguments.arch, arguments.image_size)
        path.write_bytes(_networks.exported(made).SerializeToString())
        medians = rounds(path, arguments)
    ratios: dict[str, Ratio] = {}
    for name in (name for name in medians if " " in name):
        backend, tool = name.split(" ", 1)
        ratios[f"ours / {tool} ({backend})"] = bootstrap_ratio(medians[backend], medians[name], paired=True)
    facts = {"arch": arguments.arch, "image_size": arguments.image_size, "threads": arguments.threads, "seconds": arguments.seconds, "limit": LIMIT}
    facts["rounds"] = arguments.rounds
    RESULTS.mkdir(exist_ok=True)
    found = {
        **facts,
        "ratios": {label: ratio._asdict() for label, ratio in ratios.items()},
        "medians_ms": medians,
        "environment": environment(("onnxruntime", "openvino")),
    }
    (RESULTS / "agreement.json").write_text(json.dumps(found, indent=2) + "\n")
    for label, ratio in ratios.items():
        print(f"{label}: {ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]")
    print("median of medians, ms:", {name: round(statistics.median(values), 3) for name, values in medians.items()})
    return 0 if all(abs(r.value - 1) <= LIMIT for r in ratios.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
