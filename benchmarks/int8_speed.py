"""How much faster is INT8 on CPUs? Each network's FP32 and INT8 on ONNX Runtime and OpenVINO, and as NNCF quantises it, interleaved.

    python benchmarks/int8_speed.py                                     # about 20 minutes on two cores
    python benchmarks/int8_speed.py --nncf-python OTHER_VENV/bin/python    # NNCF lives elsewhere: uv pip install nncf openvino onnx

Batches 1 and 8 with all threads on one stream show latency; OpenVINO's throughput mode, batch 1 with a stream on every thread, is timed as well. Ratios
are paired by block; several rounds repeat the whole comparison in fresh processes. Weights are random: speed does not depend on them. Writes
benchmarks/results/int8_speed_with_vnni.json and .md, or ..._without_vnni, by this machine's CPU. With VNNI
INT8 as it is built for CPUs without is timed too.

What to expect: a CPU without VNNI multiplies 32 pairs of INT8 with two instructions (vpmaddubsw, vpmaddwd) and 8 pairs of FP32 with one (vfmadd), so that
equally good kernels are 2 times faster in INT8; with VNNI it is 4 times.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import _networks
import numpy as np
from _timing import Pair, interleaved
from numpy.typing import NDArray

from deployopt.backends import onnxruntime, openvino
from deployopt.bench.environment import environment
from deployopt.bench.images import natural_noise
from deployopt.bench.scenarios import ScenarioName
from deployopt.runtime.openvino_session import load_vendor
from deployopt.runtime.preprocessing import to_feed
from deployopt.runtime.saturation import has_vnni_here, saturates_here

RESULTS = Path(__file__).resolve().parent / "results"
NNCF = Path(__file__).resolve().parent / "nncf_quantize.py"
PAIRS = (
    Pair("ONNX Runtime FP32 / INT8", "onnxruntime/fp32", "onnxruntime/int8"),
    Pair("OpenVINO FP32 / INT8", "openvino/fp32", "openvino/int8"),
    Pair("OpenVINO INT8, NNCF's / ours", "openvino/nncf", "openvino/int8"),
    Pair("ONNX Runtime INT8, clipped for CPUs without VNNI / for this one", "onnxruntime/clipped", "onnxruntime/int8"),
    Pair("OpenVINO INT8, clipped for CPUs without VNNI / for this one", "openvino/clipped", "openvino/int8"),
)
NNCF_PAIR = PAIRS[2]
BACKENDS = {"onnxruntime": onnxruntime, "openvino": openvino}
CALIBRATION_IMAGES = 16


def files(arch: str, image_size: int, folder: Path, nncf_python: str) -> tuple[dict[str, Path], dict[str, Any]]:
    """What is timed, by "backend/precision", and {"no_nncf": why NNCF's is not among it, or None; "nncf": the versions it was made with}."""
    canonical = _networks.canonical(arch, image_size)
    for name, model in (("fp32", canonical.fp32), ("int8", canonical.int8)):
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    found = {
        f"{name}/{precision}": backend.prepare(folder / f"{precision}.onnx", precision, folder / f"{name}-{precision}.onnx")
        for name, backend in BACKENDS.items()
        for precision in ("fp32", "int8")
    }
    if has_vnni_here():
        for name, backend in BACKENDS.items():
            found[f"{name}/clipped"] = backend.prepare(folder / "int8.onnx", "int8", folder / f"{name}-clipped.onnx", {"vnni": False})
    np.save(folder / "images.npy", to_feed(natural_noise(CALIBRATION_IMAGES, image_size, image_size, 3, seed=0)))
    command = [nncf_python, str(NNCF), str(folder / "fp32.onnx"), str(folder / "images.npy"), str(folder / "nncf.xml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return found, {"no_nncf": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1], "nncf": None}
    return {**found, "openvino/nncf": folder / "nncf.xml"}, {"no_nncf": None, "nncf": json.loads(done.stdout.strip().splitlines()[-1])}


def rounding(path: Path, images: NDArray[np.float32]) -> float:
    """How far OpenVINO's INT8 kernels are from the same graph computed in float: the root mean square of the difference over that of the outputs.

    Both round at every Q/DQ pair, so that a fraction of a step decides here and there; sums that overflow 16 bits (vpmaddubsw) are worse than that.
    """
    core = load_vendor().Core()
    model = core.read_model(str(path))
    integers, floats = (
        np.concatenate([next(iter(compiled([image[None]]).values())) for image in images])
        for compiled in (core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": mode}) for mode in ("ON", "OFF"))
    )
    return float(np.sqrt(np.mean((integers - floats) ** 2) / np.mean(floats**2)))


def one_round(paths: dict[str, Path], arguments: argparse.Namespace, scenario: ScenarioName, batch: int, seed: int) -> dict[str, Any]:
    """Everything timed once; offline only what OpenVINO runs, as ONNX Runtime has one stream."""
    images = natural_noise(8 * batch, arguments.image_size, arguments.image_size, 3, seed)
    timed = {key: path for key, path in paths.items() if scenario == "single_stream" or key.startswith("openvino/")}
    return interleaved(timed, PAIRS, images, scenario=scenario, batch=batch, threads=arguments.threads, seconds=arguments.seconds, seed=seed)


def markdown(networks: dict[str, Any], facts: dict[str, Any]) -> str:
    where = facts["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    lines = [
        f"{where['cpu']['model']}, {where['cpu']['cores']} cores ({', '.join(where['cpu']['isa'])}), {where['os']}, {versions}, {where['utc']}.",
        f"{facts['image_size']} pixels, {facts['threads']} threads, offline a stream on each; median over rounds [smallest, largest].",
        "",
        "| network | scenario | batch | ratio | value | rounds | marked invalid |",
        "|---|---|---|---|---|---|---|",
    ]
    for arch, network in networks.items():
        modes = dict.fromkeys((r["scenario"], r["batch"]) for r in network["rounds"])
        for (scenario, batch), (label, slow, fast) in product(modes, PAIRS):
            rounds = [r for r in network["rounds"] if (r["scenario"], r["batch"]) == (scenario, batch) and label in r["ratios"]]
            if not rounds:
                continue
            values = [r["ratios"][label][0] for r in rounds]
            invalid = sum(bool(r["rows"][key]["invalid"]) for r in rounds for key in (slow, fast))
            shown = f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"
            lines.append(f"| {arch} | {scenario.replace('_', ' ')} | {batch} | {label} | {shown} | {len(values)} | {invalid} of {2 * len(values)} rows |")
        for key, difference in network["rounding"].items():
            lines.append(f"| {arch} | | | outputs of {key} against the same graph's in float | {100 * difference:.1f} % (RMS) | | |")
        if network["nncf"]:
            lines.append(f"| {arch} | | | NNCF's network | by NNCF {network['nncf']['nncf']}, OpenVINO {network['nncf']['openvino']} | | |")
        if network["no_nncf"]:
            lines.append(f"| {arch} | | | {NNCF_PAIR.label} | not measured: {network['no_nncf']} | | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="timed for each row and round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nncf-python", default=sys.executable, help="a Python that has NNCF and OpenVINO")
    arguments = parser.parse_args()
    asked: list[tuple[ScenarioName, int]] = [*(("single_stream", batch) for batch in arguments.batch_sizes), ("offline", 1)]
    networks: dict[str, Any] = {}
    for arch in arguments.archs:
        with TemporaryDirectory() as folder:
            paths, nncf = files(arch, arguments.image_size, Path(folder), arguments.nncf_python)
            images = np.load(Path(folder) / "images.npy")
            differences = {key: rounding(paths[key], images) for key in ("openvino/int8", "openvino/nncf") if key in paths}
            rounds = [one_round(paths, arguments, scenario, batch, seed) for seed in range(arguments.rounds) for scenario, batch in asked]
        networks[arch] = {"rounds": rounds, "rounding": differences, **nncf}
        print(arch, *(f"{r['scenario']} b{r['batch']} {r['ratios']}" for r in rounds), nncf["no_nncf"] or "", sep="\n  ", flush=True)
    facts = {
        "threads": arguments.threads,
        "image_size": arguments.image_size,
        "environment": environment((*onnxruntime.distributions, *openvino.distributions)),
    }
    RESULTS.mkdir(exist_ok=True)
    name = f"int8_speed_{'with_vnni' if has_vnni_here() else 'without_vnni' if saturates_here() else platform.machine()}"
    (RESULTS / f"{name}.json").write_text(json.dumps({**facts, "networks": networks}, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text(markdown(networks, facts))


if __name__ == "__main__":
    main()
