"""Repeat the main recipe over seeds: accuracy and speed-up of each variant with n and spread.

    python benchmarks/main_recipe.py --seeds 0 1 2          # about five minutes a seed on two cores

Every seed starts from nothing cached. Latency ratios are taken inside each run, which interleaves all its rows; a figure here is the median
over seeds with its range. Writes benchmarks/results/main_recipe.json (or --output) after every seed. --set overrides keys of the recipe, as in
`deployopt run`, and is written down with the figures.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import deployopt
from deployopt.report import Report
from deployopt.runtime.files import atomic_write_json

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "resnet18_int8.yaml"
RESULT = Path(__file__).resolve().parent / "results" / "main_recipe.json"


def figures(report: Report) -> dict[str, dict[str, float | None]]:
    """Accuracy loss against the dense FP32 model in points, and speed-up over its row on the same backend, of each measured row."""
    dense = {(r["backend"], r["batch"]): r for r in report.rows if r["variant"] == report["variants"][0]["name"] and r["precision"] == "fp32"}
    found = {}
    for row in report.rows:
        if row["status"] != "ok" or row["backend"] == "torch":
            continue
        base = dense[row["backend"], row["batch"]]
        loss = 100 * (base["accuracy"]["top1"] - row["accuracy"]["top1"])
        key = f"{row['variant']}/{row['backend']}/{row['precision']}/b{row['batch']}"
        found[key] = {"top1": row["accuracy"]["top1"], "loss_pp": loss, "speedup": row["speedup"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[])
    parser.add_argument("--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    seconds: list[float] = []
    for seed in asked.seeds:
        print(f"seed {seed} …", file=sys.stderr, flush=True)
        began = time.monotonic()
        with TemporaryDirectory() as folder:
            report = deployopt.run(deployopt.load_recipe(RECIPE, [*asked.overrides, f"seed={seed}"]), run_dir=folder, fresh=True)
        seconds.append(round(time.monotonic() - began, 1))
        for key, values in figures(report).items():
            rows[key].append({"seed": seed, **values})
        document = {"recipe": RECIPE.name, "overrides": asked.overrides, "environment": report["environment"], "seconds": seconds, "rows": rows}
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(asked.output, document)
    print(f"{'row':34} {'n':>2} {'top-1 %':>8} {'loss pp, median [range]':>26} {'speed-up, median [range]':>26}")
    for key, found in rows.items():
        losses, ratios = [v["loss_pp"] for v in found], [v["speedup"] for v in found if v["speedup"] is not None]
        top1 = 100 * statistics.median(v["top1"] for v in found)
        print(f"{key:34} {len(found):>2} {top1:8.2f} {_spread(losses):>26} {_spread(ratios):>26}")
    print(f"seconds a run: {_spread(seconds)}")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]" if values else "–"


if __name__ == "__main__":
    main()
