"""Prune a small trained network to half of its measured latency, and measure afterwards, independently, what came out.

    python benchmarks/latency_target.py --backends openvino onnxruntime     # 5 to 10 minutes a backend on two free cores
    python benchmarks/latency_target.py --threads 1                         # the same with one thread

For each backend: ResNet-18 with ImageNet's stem is trained on digits of 64 pixels, pruned to `latency.ratio`, trained again, exported, built and measured
by `benchmark` against the dense network: other processes, other rounds and longer than in the search. Each repeat measures anew. A figure is the ratio of
p50 latencies, pruned to dense, from interleaved rounds. Of networks below a millisecond much is spent between the layers, whatever their widths, and no
candidate may reach half. Adds to benchmarks/results/latency_target.json and .md: a backend measured again with as many threads replaces its line; another
ratio, batch size or time starts both files anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import deployopt
from deployopt.report import Report
from deployopt.report.markdown import table
from deployopt.runtime.statistics import bootstrap_ratio

RESULTS = Path(__file__).resolve().parent / "results"
RECIPE = """
name: latency_target
seed: 0
task: classification
model: {{arch: resnet18, stem: imagenet}}
data: {{name: digits, image_size: 64}}
stages:
  - finetune: {{epochs: 2}}
  - prune: {{target: {{latency: {{backend: {backend}, batch: {batch}, ratio: {ratio}}}}}, round_to: 1, finetune: {{epochs: 1, warmup_epochs: 0}}}}
  - export: {{precisions: [fp32]}}
  - build: {{backends: [{backend}], batch_sizes: [{batch}]}}
  - benchmark: {{batch_sizes: [{batch}], min_seconds: {seconds}, blocks: 60, accuracy: false}}
"""


def measured(report: Report, folder: Path) -> dict[str, Any]:
    """The ratio of p50 latencies, pruned to dense, from the block medians of the rounds they share."""
    rows = {r["variant"]: r for r in report.rows if r["backend"] != "torch"}
    pruned, dense = (json.loads((folder / rows[v]["samples"]).read_text())["host_block_medians"] for v in ("prune", "finetune"))
    rounds = min(len(pruned), len(dense))
    ratio = bootstrap_ratio(pruned[:rounds], dense[:rounds], paired=True)
    status = {v: rows[v]["reason"] or rows[v]["status"] for v in rows}
    return {"ratio": ratio.value, "ratio_ci95": [ratio.low, ratio.high], "blocks": rounds, "status": status}


def one_backend(backend: str, threads: int, ratio: float, batch: int, repeats: int, seconds: float) -> dict[str, Any]:
    """Search once, measure `repeats` times: only `benchmark` runs again, the rest is the same run's."""
    with TemporaryDirectory() as folder:
        recipe = Path(folder) / "latency_target.yaml"
        recipe.write_text(RECIPE.format(backend=backend, batch=batch, ratio=ratio, seconds=seconds))
        run = Path(folder) / "run"
        reports, found = [], []
        for _ in range(repeats):
            reports.append(deployopt.run(deployopt.load_recipe(recipe), run_dir=run, threads=threads))
            found.append(measured(reports[-1], run))
    pruning = next(v for v in reports[0]["variants"] if v["name"] == "prune")["record"]["pruning"]
    facts = {"backend": backend, "threads": threads, "environment": reports[0]["environment"]}
    return {**facts, "search": pruning["latency"], "reached": pruning["reached"], "repeats": found}


def summarized(found: list[dict[str, Any]], target: float) -> str:
    """A Markdown table: a line a backend and number of threads."""
    lines = []
    for facts in found:
        ratios, last = [r["ratio"] for r in facts["repeats"]], facts["search"][-1]
        low, high = min(r["ratio_ci95"][0] for r in facts["repeats"]), max(r["ratio_ci95"][1] for r in facts["repeats"])
        median = statistics.median(ratios)
        afterwards = (f"{median:.3f}", f"{min(ratios):.3f}–{max(ratios):.3f}", f"{low:.3f}–{high:.3f}", f"{100 * (median / target - 1):+.1f} %")
        lines.append([facts["backend"], facts["threads"], target, len(last["trace"]), f"{last['reached']['ratio']:.3f}", len(ratios), *afterwards])
    headers = ["backend", "threads", "target", "measurements", "reached in the search", "n", "median afterwards", "range", "widest 95 %", "off target"]
    return table(headers, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["openvino", "onnxruntime"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="timed for each row of each repeat")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    asked = {"ratio": options.ratio, "batch": options.batch, "seconds": options.seconds}
    before: dict[str, Any] = json.loads((RESULTS / "latency_target.json").read_text()) if (RESULTS / "latency_target.json").exists() else {}
    found: list[dict[str, Any]] = before["found"] if before.get("asked") == asked else []
    for backend in options.backends:  # written after each: a later one may fail
        found = [facts for facts in found if (facts["backend"], facts["threads"]) != (backend, options.threads)]
        found.append(one_backend(backend, options.threads, options.ratio, options.batch, options.repeats, options.seconds))
        text = summarized(found, options.ratio)
        (RESULTS / "latency_target.json").write_text(json.dumps({"asked": asked, "found": found}, indent=2) + "\n")
        (RESULTS / "latency_target.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
