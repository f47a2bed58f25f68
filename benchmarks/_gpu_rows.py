"""What `gpu.py` measures: keys, samples, stored results that an interrupted run goes on from, tables. Standard library and NumPy, Python 3.10."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deployopt.errors import UsageError
from deployopt.runtime import host, manifest
from deployopt.runtime.files import atomic_write, atomic_write_json
from deployopt.runtime.hashing import sha256_file

ARCHS = ("resnet18", "resnet50")
VARIANTS = ("dense", "pruned")
PRECISIONS = ("fp32", "fp16", "int8", "int8_fp16")
BATCH_SIZES = (1, 8, 64)
SAMPLES = "samples.npz"
REASON = 200  # characters of a reason in a terminal
WEIGHTS = "Bodies have random weights, on which speed does not depend; where accuracy is told, the last layer is fitted."


class Samples(NamedTuple):
    """Images uint8 [n, H, W, 3] of equal channels, classes [n], and outputs float32 [n, K] of ONNX Runtime by "arch-variant-precision"."""

    images: np.ndarray
    targets: np.ndarray
    references: dict[str, np.ndarray]


def write_samples(path: Path, samples: Samples) -> None:
    np.savez_compressed(path, images=samples.images[..., 0], targets=samples.targets, **samples.references)  # type: ignore[arg-type] # its stub: allow_pickle


def read_samples(path: Path) -> Samples:
    with np.load(path) as stored:
        references = {name: stored[name] for name in stored.files if name not in ("images", "targets")}
        return Samples(np.repeat(stored["images"][..., None], 3, axis=-1), stored["targets"], references)


def path_of(folder: Path, arch: str, variant: str, precision: str, suffix: str = ".onnx") -> Path:
    return folder / f"{arch}-{variant}-{precision}{suffix}"


def utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class Results:
    """Results of one subcommand on one GPU: `<out>/<gpu>/<name>.json`. Each entry is stored at once; `name in results` tells what is done.

    Args:
        runtime: name and version of what computes; stored results of another are refused.

    Raises:
        UsageError: they are of another runtime.
    """

    def __init__(self, out: Path, name: str, gpu: str, runtime: str) -> None:
        self.path = out / _slug(gpu) / f"{name}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.document: dict[str, Any] = {"schema": 1, "gpu": gpu, "runtime": runtime, "started": utc_now(), "entries": {}}
        if self.path.exists():
            stored = json.loads(self.path.read_text())
            if stored["runtime"] != runtime:
                raise UsageError(f"{self.path.name} holds figures of {stored['runtime']}; here is {runtime}", "move it away, or choose another --out")
            self.document = stored

    def __contains__(self, key: object) -> bool:
        return key in self.document["entries"]

    def __getitem__(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = self.document["entries"][key]
        return found

    def keep(self, key: str, entry: dict[str, Any]) -> None:
        self.document["entries"][key] = {"utc": utc_now(), **entry}
        atomic_write_json(self.path, self.document)

    def done(self, prefix: str) -> dict[str, dict[str, Any]]:
        """Entries of one kind, by key without the prefix; those without figures left out."""
        entries = {key: entry for key, entry in self.document["entries"].items() if key.startswith(prefix) and "failed" not in entry}
        return {key[len(prefix) :]: entry for key, entry in entries.items()}

    def forget_failures(self) -> None:
        """Have what failed done anew, with the whole groups that it belongs to: what is compared is timed together."""
        archs = {key.split(":")[1].partition("-")[0] for key in self.failures() if key.startswith(("row:", "build:"))}
        again = tuple(f"group:{arch}:" for arch in archs)
        self.document["entries"] = {key: entry for key, entry in self.document["entries"].items() if "failed" not in entry and not key.startswith(again)}

    def failures(self) -> dict[str, str]:
        return {key: entry["failed"] for key, entry in self.document["entries"].items() if "failed" in entry}

    def write_summary(self, tables: str) -> None:
        """`<name>.md` beside the JSON."""
        machines = [entry["machine"] for entry in self.done("group:").values()]
        drivers = {gpu["driver"] for machine in machines for gpu in machine["gpus"]}
        pythons = {f"Python {machine['python']}, NumPy {machine['numpy']}" for machine in machines}
        cuda = {entry["made_of"]["cuda"] for entry in self.done("row:").values() if entry["made_of"].get("cuda")}
        used = [f"driver {', '.join(sorted(drivers)) or 'unknown'}", *(f"CUDA runtime {version}" for version in sorted(cuda)), *sorted(pythons)]
        facts = f"{self.document['runtime']}, {', '.join(used)}, from {self.document['started']}. {WEIGHTS}"
        failed = "".join(f"\n- {key}: {' '.join(reason.split())}" for key, reason in self.failures().items())
        text = f"# {self.document['gpu']}: {self.path.stem}\n\n{facts}\n\n{tables}"
        atomic_write(self.path.with_suffix(".md"), text + (f"\nWithout figures:\n{failed}\n" if failed else ""))


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def machine() -> dict[str, Any]:
    """Where one group was taken: a run that goes on may do so on another machine with such a GPU."""
    where = {"gpus": host.gpus(), "cpu": host.cpu()["model"], "os": host.operating_system()}
    return {**where, "python": platform.python_version(), "numpy": np.__version__}


def made_of(path: Path) -> dict[str, Any]:
    """Which file was timed: an engine's hash, its ONNX's, and the CUDA runtime of its build; an ONNX file's hash; nothing of a torchvision network."""
    if manifest.path_of(path).exists():
        described = manifest.read(path)
        return {"sha256": described.sha256, "onnx_sha256": described.onnx_sha256, "cuda": described.cuda}
    return {"onnx_sha256": sha256_file(path)} if path.is_file() else {}


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table whose columns also line up in a terminal."""
    lines = [header, tuple("---" for _ in header), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n" for line in lines)


def ratio_of(ratio: Sequence[float] | None) -> str:
    """Of (value, low, high)."""
    return "" if ratio is None else f"{ratio[0]:.4g} [{ratio[1]:.4g}, {ratio[2]:.4g}]"


def short_table(rows: dict[str, dict[str, Any]]) -> str:
    """A line a row with its batches side by side: median by the device's clock, or where a runtime has none by the host's, and the speed-up."""
    batches = sorted({int(key.rpartition(":b")[2]) for key in rows})
    names = dict.fromkeys(key.rpartition(":b")[0] for key in rows)
    lines = [(name, *(_short(rows.get(f"{name}:b{batch}")) for batch in batches)) for name in names]
    return table(("p50 ms, speed-up", *(f"batch {batch}" for batch in batches)), lines)


def _short(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    clock = entry["device_ms"] or entry["host_ms"]
    return f"{clock['p50']:.3f}" + (f" {entry['speedup'][0]:.2f}x" if entry["speedup"] else "")


def short_failures(failures: dict[str, str]) -> str:
    """Each reason once, with the first of its keys."""
    keys: dict[str, list[str]] = {}
    for key, reason in failures.items():
        keys.setdefault(" ".join(reason.split())[:REASON], []).append(key)
    return "".join(f"failed: {found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''}: {reason}\n" for reason, found in keys.items())


def row_table(rows: dict[str, dict[str, Any]]) -> str:
    """Medians of rows by "name:bBATCH", and how far their outputs are from the reference's."""
    lines = []
    for key, entry in rows.items():
        name, _, batch = key.rpartition(":b")
        on_device, outputs = entry["device_ms"], entry["outputs"]
        differs = ("", "") if outputs is None else (f"{outputs['max_abs_diff']:.2g}", f"{outputs['top1_agreement']:.3f}")
        clocks = f"{entry['host_ms']['p50']:.3f}", "" if on_device is None else f"{on_device['p50']:.3f}"
        graph = str(entry.get("cuda_graph", "")).partition(":")[0]  # "refused" without the reason, which the JSON has
        lines.append((name, batch, graph, *clocks, ratio_of(entry["speedup"]), *differs))
    return table(("row", "batch", "CUDA graph", "host p50 ms", "device p50 ms", "speed-up", "max abs diff", "top-1 agreement"), lines)
