"""How long the tool itself takes from a float network to its INT8 ONNX, step by step.

    python benchmarks/export_speed.py                       # ResNet-18 and -50 at 224, about three minutes on two cores

Each network runs in a process of its own, so the first one's imports and caches help no other; the median over `--repeats` processes is reported
with its range. Calibration is one batch of two images: how long more images take is the network's forward pass, not the tool. So is the comparison
of the file with the network on validation images, which `export` adds.
Writes benchmarks/results/export_speed.json and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from deployopt.bench.environment import environment
from deployopt.graph import OPSET

RESULT = Path(__file__).resolve().parent / "results" / "export_speed.json"


def steps(arch: str, image_size: int) -> dict[str, float]:
    """Seconds of each step, in order."""
    import torch

    from deployopt.graph.canonical import canonicalize
    from deployopt.graph.checks import check
    from deployopt.nn import models
    from deployopt.nn.capture import example_input
    from deployopt.nn.export import deployed, to_onnx
    from deployopt.nn.prepared import Prepared, Scheme
    from deployopt.runtime.files import atomic_write
    from deployopt.runtime.preprocessing import Preprocessing

    seconds: dict[str, float] = {}

    @contextmanager
    def timed(step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[step] = time.perf_counter() - start

    torch.manual_seed(0)
    network = models.build({"arch": arch, "outputs": 1000}, Preprocessing(image_size, 3, None, (0.5,) * 3, (0.25,) * 3)).eval()
    example = example_input(network.preprocessing)
    with timed("prepare"):
        prepared = Prepared(network, Scheme())
    with timed("calibrate"):
        prepared.calibrate([torch.rand(example.shape)])
    with timed("write_back"):
        prepared.write_back(network)
    with timed("fake_quantized"):
        module = deployed(network)
    with timed("to_onnx"):
        model = to_onnx(module, example, OPSET)
    with timed("canonicalize"):
        canonicalize(model)
    with timed("check"):
        check(model)
    with timed("write"), TemporaryDirectory() as folder:
        atomic_write(Path(folder) / "int8.onnx", model.SerializeToString(deterministic=True))
    return seconds


def in_a_process(arch: str, image_size: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", arch, "--image-size", str(image_size)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(steps(arguments.one, arguments.image_size)))
        return
    runs = {arch: [in_a_process(arch, arguments.image_size) for _ in range(arguments.repeats)] for arch in arguments.archs}
    RESULT.parent.mkdir(exist_ok=True)
    where = environment(["torch", "torchao", "onnx", "onnxscript"])
    RESULT.write_text(json.dumps({"opset": OPSET, "image_size": arguments.image_size, "environment": where, "seconds": runs}, indent=2) + "\n")
    names = list(next(iter(runs.values()))[0])
    print(f"| seconds, median of {arguments.repeats} [range] | {' | '.join(runs)} |\n|:--|{'--:|' * len(runs)}")
    for name in [*names, "total", "convert + export"]:
        print(f"| {name} | {' | '.join(_spread([_part(run, name) for run in found]) for found in runs.values())} |")


def _part(run: dict[str, float], name: str) -> float:
    if name == "convert + export":
        return sum(run[step] for step in ("write_back", "fake_quantized", "to_onnx", "canonicalize", "check", "write"))
    return sum(run.values()) if name == "total" else run[name]


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


if __name__ == "__main__":
    main()
