"""Fashion-MNIST, whole 10,000-image test split: what pruning plus INT8 costs against a dense network trained as long in total.

    python benchmarks/fashion_mnist.py --limits 20000 --seeds 0 1 2       # about two and a half hours on two AVX2 cores
    python benchmarks/fashion_mnist.py --limits 60000 --seeds 0           # about two and a quarter hours on two AVX-512 cores

Both are ResNet-18 with its ImageNet stem on images scaled to 32 pixels, trained in schedules that each go from the full learning rate to zero (warm
restarts, https://arxiv.org/abs/1608.03983): TRAININGS below. The dense one's each take as long as those before together, and it is judged after each but
the first. The other one is cut after the first or second, goes on smaller, and ends after as many epochs in all: at 27 % of the MACs on 20,000 images; at
39 % on 60,000, of which a network that small learns less than the dense one. So they can be compared after as many images, and after fewer, where the
dense one has computed about as much or still more: both are told (Scratch-E and Scratch-B of https://arxiv.org/abs/1810.05270).
The loss is paired: both networks' predictions on the same images, its interval a bootstrap over images, and so says nothing about the spread over seeds,
which is listed. Networks are trained in two processes of one thread, which on two cores is a quarter faster than one of two. When all are trained, they
are timed on test images at 64 pixels, batch 1, two threads: the dense one's FP32 on ONNX Runtime against INT8, interleaved; with `--train-only` that is
left to a later call on a quiet machine. Run folders stay in runs/fashion_mnist, and a run that was broken off goes on from its last finished stage.
Adds to benchmarks/results/fashion_mnist.json; a finished (limit, seed) is not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import _networks
import numpy as np
from _timing import Pair, interleaved
from numpy.typing import NDArray

import deployopt
from deployopt.backends import onnxruntime, openvino
from deployopt.data import ImageSet
from deployopt.nn import checkpoint
from deployopt.report import Report
from deployopt.runtime.preprocessing import to_feed

RUNS = Path("runs") / "fashion_mnist"
RESULT = Path(__file__).resolve().parent / "results" / "fashion_mnist.json"
KINDS = ("dense", "compressed")
RUNTIMES = ("onnxruntime", "openvino")
PAIRS = [Pair(f"dense FP32 on ONNX Runtime / pruned INT8 on {runtime}", "onnxruntime/fp32", f"{runtime}/int8") for runtime in RUNTIMES]
AUGMENT = "augment: {horizontal_flip: true, crop_padding: 2}"
TRAINING, QAT_TRAINING = f"batch_size: 128, lr: 0.05, {AUGMENT}", f"batch_size: 128, lr: 0.005, {AUGMENT}"
TRAININGS = {  # by training images: stages with their epochs, in order
    20_000: {"dense": "finetune 12, finetune 12, finetune 24", "compressed": "finetune 2, prune 44, qat 2"},
    60_000: {"dense": "finetune 8, finetune 8, finetune 16, finetune 32", "compressed": "finetune 8, finetune 8, prune 15, finetune 31, qat 2"},
}
MACS_RATIO = {20_000: 0.27, 60_000: 0.39}  # of the pruned network; one that small learns less than the dense one from all images
RECIPE = """
name: {name}
seed: {seed}
model: {{arch: resnet18, weights: null, stem: imagenet}}
data: {{name: fashion_mnist, image_size: 32, limit: {limit}}}
stages:
{stages}
  - export: {{precisions: [{precision}]}}
  - build: {{backends: [onnxruntime, openvino], batch_sizes: [1, {batch}]}}
  - benchmark: {{batch_sizes: [1, {batch}], min_seconds: 0.5, profile: false, accuracy: {scored}}}
"""
BATCH = 50  # images are scored in


def folder_of(limit: int, seed: int, kind: str) -> Path:
    return RUNS / f"{limit}-{seed}-{kind}"


def steps(training: str) -> list[tuple[str, int]]:
    """The stages of one of `TRAININGS` with their epochs."""
    words = [step.split() for step in training.split(", ")]
    return [(stage, int(epochs)) for stage, epochs in words]


def stage_of(limit: int, kind: str, epochs: int) -> str:
    """One training stage, in YAML."""
    if kind == "prune":
        return f"  - prune: {{target: {{macs_ratio: {MACS_RATIO[limit]}}}, finetune: {{epochs: {epochs}, {TRAINING}}}}}"
    if kind == "qat":
        return f"  - qat: {{epochs: {epochs}, {QAT_TRAINING}, distill: {{}}}}"
    return f"  - finetune: {{epochs: {epochs}, {TRAINING}}}"


def run(limit: int, seed: int, kind: str, threads: int, until: str | None) -> Report:
    """Train, export, build and score one of the two networks. What its own benchmark stage times beside other trainings is not used."""
    compressed, folder = kind == "compressed", folder_of(limit, seed, kind)
    stages = [stage_of(limit, *training) for training in steps(TRAININGS[limit][kind])]
    stages[0] = stages[0].replace("{", "{warmup_epochs: 1, ", 1)
    text = RECIPE.format(
        name=kind,
        seed=seed,
        limit=limit,
        stages="\n".join(stages),
        precision="int8" if compressed else "fp32",
        batch=BATCH,
        scored=str(compressed).lower(),  # for the agreement with the quantised network; both are scored below
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(text)
    return deployopt.run(deployopt.load_recipe(folder / "recipe.yaml"), run_dir=folder / "run", threads=threads, until=until)


def test_split(folder: Path, **changed: object) -> ImageSet:
    """Of a recipe's data set, with some of its options changed."""
    planned = deployopt.plan(deployopt.load_recipe(folder / "recipe.yaml"))
    return planned.data.load(planned.data_config.model_copy(update=changed)).test


def correct(folder: Path, row: str) -> NDArray[np.float64]:
    """1 where the row's artifact is right about a test image, else 0: [10000]."""
    test = test_split(folder)
    with deployopt.open_session(f"{folder / 'run'}:{row}", threads=2) as session:
        outputs = [next(iter(session.infer({"input": to_feed(test.images(range(i, i + BATCH)))}).values())).copy() for i in range(0, len(test), BATCH)]
    return np.asarray(np.concatenate(outputs).argmax(1) == test.targets, dtype=np.float64)


def paired_loss(dense: NDArray[np.float64], compressed: NDArray[np.float64]) -> dict[str, Any]:
    """Loss in points with its 95 % bootstrap interval over images."""
    difference = 100 * (dense - compressed)
    random = np.random.default_rng(0)
    means = [float(random.choice(difference, len(difference)).mean()) for _ in range(2000)]
    low, high = np.quantile(means, [0.025, 0.975])
    return {"loss_pp": float(difference.mean()), "loss_ci95": [float(low), float(high)], "n": len(difference)}


def speed(folders: dict[str, Path], limit: int, size: int = 64, rounds: int = 3) -> list[dict[str, Any]]:
    """The trained networks exported for inputs of another size, and timed in `rounds` sets of new processes."""
    with TemporaryDirectory() as temporary:
        paths = {}
        for kind, precision, runtimes in (("dense", "fp32", (onnxruntime,)), ("compressed", "int8", (onnxruntime, openvino))):
            last = len(steps(TRAININGS[limit][kind])) - 1
            (stage,) = (folders[kind] / "run").glob(f"{last:02}-*")
            network = checkpoint.load(stage)
            network.preprocessing = network.preprocessing._replace(image_size=size)
            canonical = Path(temporary) / f"{kind}.onnx"
            canonical.write_bytes(_networks.exported(network).SerializeToString())
            for runtime in runtimes:
                name = runtime.__name__.rpartition(".")[2]
                paths[f"{name}/{precision}"] = runtime.prepare(canonical, precision, Path(temporary) / f"{kind}-{name}.onnx")
        test = test_split(folders["dense"], image_size=size)
        images = test.images(np.random.default_rng(0).permutation(len(test))[:8])
        return [interleaved(paths, PAIRS, images, source="test split", threads=2, seconds=5, seed=seed) for seed in range(rounds)]


def judged(training: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The dense network's stages from the second on, each with the epochs it has been trained for then."""
    return [(f"finetune_{i}", sum(epochs for _, epochs in training[:i])) for i in range(2, len(training) + 1)]


def experiment(limit: int, seed: int, reports: dict[str, Report]) -> dict[str, Any]:
    """What the two finished runs of one seed on `limit` training images (a tenth of them held out for validation) show."""
    folders = {kind: folder_of(limit, seed, kind) for kind in KINDS}
    faster, rows, trainings = speed(folders, limit), {}, {kind: steps(training) for kind, training in TRAININGS[limit].items()}
    macs = {kind: report["variants"][-1]["macs"] for kind, report in reports.items()}
    cut = [stage for stage, _ in trainings["compressed"]].index("prune")
    computed = sum(epochs * macs["dense" if i < cut else "compressed"] for i, (_, epochs) in enumerate(trainings["compressed"]))
    for runtime in RUNTIMES:
        compressed = correct(folders["compressed"], f"qat/{runtime}/int8/b1")
        against = []
        for stage, trained_for in judged(trainings["dense"]):
            dense = correct(folders["dense"], f"{stage}/{runtime}/fp32/b1")
            cost = trained_for * macs["dense"] / computed
            against.append({"epochs": trained_for, "training_macs_ratio": cost, "top1": float(dense.mean()), **paired_loss(dense, compressed)})
        row = next(r for r in reports["compressed"].rows if r["backend"] == runtime)
        rows[runtime] = {
            "compressed_top1": float(compressed.mean()),
            "dense": against,
            "verified": row["verified"],
            "torch_agreement": row["accuracy"].get("torch_agreement"),
        }
    return {
        "limit": limit,
        "seed": seed,
        "trainings": TRAININGS[limit],
        "macs": macs,
        "macs_ratio": macs["dense"] / macs["compressed"],
        "rows": rows,
        "speed_64px": faster,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": reports["compressed"]["environment"],
    }


def trained(wanted: Sequence[tuple[int, int]], jobs: int, until: str | None = None) -> list[dict[str, Report]]:
    """The reports of both networks for each (limit, seed), run up to a stage."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        asked = [{kind: pool.submit(run, limit, seed, kind, threads=1, until=until) for kind in KINDS} for limit, seed in wanted]
        return [{kind: future.result() for kind, future in reports.items()} for reports in asked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limits", type=int, nargs="+", choices=TRAININGS, default=[20_000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="networks trained at once, on one thread each")
    parser.add_argument("--train-only", action="store_true", help="neither score nor time them yet")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = json.loads(RESULT.read_text()) if RESULT.exists() else []
    finished = {(f["limit"], f["seed"]) for f in found if f["trainings"] == TRAININGS[f["limit"]]}  # those trained otherwise stay in the file
    wanted = [pair for pair in product(arguments.limits, arguments.seeds) if pair not in finished]
    if arguments.train_only:
        trained(wanted, arguments.jobs, until="export")
        return
    for (limit, seed), reports in zip(wanted, trained(wanted, arguments.jobs), strict=True):
        found.append(experiment(limit, seed, reports))
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'images':>7} {'seed':>4} {'runtime':12} {'pruned INT8 %':>13} {'epochs: dense %':>16} {'its training MACs':>18}  loss in points [95 %]")
    for entry in found:
        for runtime, row in entry["rows"].items():
            for dense in row["dense"]:
                (low, high), trained_for = dense["loss_ci95"], f"{dense['epochs']}: {100 * dense['top1']:.2f}"
                print(
                    f"{entry['limit']:>7} {entry['seed']:>4} {runtime:12} {100 * row['compressed_top1']:13.2f} {trained_for:>16} "
                    f"{dense['training_macs_ratio']:17.2f}x  {dense['loss_pp']:+.2f} [{low:+.2f}, {high:+.2f}]"
                )
        for label, _, _ in PAIRS:
            ratios = [f"{r['ratios'][label][0]:.2f}" for r in entry["speed_64px"] if label in r["ratios"]]
            print(f"{'':13}{label}, 64 px: {', '.join(ratios)}")


if __name__ == "__main__":
    main()
