"""What a command line calls an artifact: a file, a torch model folder, a row of a finished run, or a run (its recommended row)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from deployopt import backends, plugins, report
from deployopt.artifact import DESCRIPTION, TORCH, TORCH_COMPILE, WEIGHTS, Artifact, ArtifactKind, Precision, read_description
from deployopt.bench.scenarios import ScenarioName
from deployopt.errors import ArtifactError, ArtifactMismatch, MissingDependency, UsageError
from deployopt.report import summary
from deployopt.runtime import manifest
from deployopt.runtime.onnxruntime_gpu import PROFILE
from deployopt.runtime.preprocessing import PREPROCESSING_KEY, Preprocessing
from deployopt.runtime.session import SessionOptions

if TYPE_CHECKING:
    from onnx import ModelProto

TORCH_OPENERS = {TORCH: "deployopt.nn.session:open", TORCH_COMPILE: "deployopt.nn.session:open_compiled"}
ENGINE_SUFFIXES = (".engine", ".plan", f".engine{manifest.COMPRESSED}")
KNOWN_FILES = (".onnx", *ENGINE_SUFFIXES, WEIGHTS)
THREADS_OF_SWEEP = re.compile(r"(^|-)t\d+$")  # as `scenarios.scenarios` names them
CLASSES_KEY = "deployopt.classes"  # in an ONNX file, written by the export stage


@dataclass(frozen=True)
class Target:
    """An artifact and how it is opened.

    Attributes:
        name: the file's name without suffix, or the row's address without its batch.
        run: the run folder it lies in, if it lies in one.
        batch, scenario: of a row whose address names its batch; None otherwise.
        threads: of a row whose address names them ("…/b1/t1", "…/b1/offline-t1"); None otherwise.
        kept_in_float: quantizable layers that mixed_precision keeps in float, by the row's record; None where none tells.
    """

    name: str
    path: Path
    backend: str
    precision: str
    options: Mapping[str, Any] = field(default_factory=dict)
    run: Path | None = None
    batch: int | None = None
    scenario: ScenarioName | None = None
    threads: int | None = None
    kept_in_float: int | None = None

    @property
    def kind(self) -> ArtifactKind:
        if self.path.name == WEIGHTS:
            return "torch"
        return "onnx" if self.path.suffix == ".onnx" else "engine"

    def session_options(self, threads: int, device: str) -> SessionOptions:
        return SessionOptions(threads, device, self.precision, self.options)

    def facts(self) -> dict[str, Any]:
        """What a row says of its file."""
        found = Artifact.of(self.kind, self.path)
        return {"path": self.path.name, "sha256": found.sha256, "bytes": found.size_bytes}


class Description(NamedTuple):
    """What is recorded of an artifact beside its weights.

    Attributes:
        preprocessing: of its input images; None if nothing is recorded.
        classes: names by index, () for a regression; None if nothing is recorded.
        max_batch: the most images it takes at once; None if it sets no limit that is known before it is opened.
    """

    preprocessing: Preprocessing | None
    classes: tuple[str, ...] | None
    max_batch: int | None = None


def opener(backend: str) -> str:
    """Where a worker finds a backend's `open`. Raises UsageError for an unknown backend."""
    return TORCH_OPENERS[backend] if backend in TORCH_OPENERS else f"{backends.find(backend).__name__}:open"


def distributions(names: Iterable[str]) -> list[str]:
    """Packages whose versions belong to figures of these backends. Raises UsageError for an unknown backend."""
    runtimes = {package for name in names for package in (("torch",) if name in TORCH_OPENERS else backends.find(name).distributions)}
    return sorted({"deployopt", "numpy", *runtimes})


def resolve(artifact: str | Path, backend: str | None = None) -> Target:
    """What `artifact` means: a file, a torch model folder, "RUN:variant/backend/precision/b1" (the batch may be left out), or RUN.

    Args:
        backend: opens it; None takes the one of the file's kind, or of the row.

    Raises:
        UsageError: nothing is there, a file of unknown kind, a row that does not exist or has no artifact, a run that recommends none.
        ArtifactCorrupt: a row's artifact is not what the report vouches for, or an engine lacks its manifest.
    """
    path = Path(artifact)
    if path.is_dir() and (path / DESCRIPTION).is_file():
        return _file(path / WEIGHTS, backend)
    if path.is_dir():
        return _recommended(path, backend)
    if path.is_file():
        return _file(path, backend)
    run, colon, address = str(artifact).rpartition(":")
    if not colon:
        raise UsageError(f"wanted an artifact file, found nothing at '{artifact}'", "give a file, a run folder, or RUN:variant/backend/precision/b1")
    return _row(Path(run), address, backend)


def measured_rows(run: Path) -> list[str]:
    """Addresses "RUN:variant/backend/precision" of the artifacts that the run measured, in the report's order.

    Raises:
        UsageError: no report, or no row was measured.
    """
    found = list(dict.fromkeys(_address(row) for row in summary.measured(report.load(run)["rows"])))
    if not found:
        raise UsageError(f"no row of {run} was measured", f"`deployopt report {run}` says why; name a file to time it all the same")
    return [f"{run}:{address}" for address in found]


def describe(target: Target) -> Description:
    """Preprocessing and classes, from the artifact itself; classes also from the report of its run.

    Raises:
        ArtifactError, MissingDependency: the file that says it cannot be read.
    """
    if target.kind == "torch":
        found = Description(Preprocessing.from_json(read_description(target.path.parent)["preprocessing"]), None)
    elif target.kind == "engine":
        recorded = manifest.read(target.path)
        found = Description(recorded.preprocessing, None, _largest(recorded.profiles))
    else:
        found = _onnx_description(target.path)._replace(max_batch=_largest([target.options.get(PROFILE, {})]))
    if found.classes is None and target.run is not None:
        classes = report.load(target.run).get("classes")
        found = found._replace(classes=None if classes is None else tuple(classes))
    return found


def _largest(profiles: Iterable[Mapping[str, Mapping[str, Sequence[int]]]]) -> int | None:
    """The most images that optimisation profiles allow at once; None if they limit nothing."""
    return max((ranges["max"][0] for profile in profiles for ranges in profile.values()), default=None)


def precision_of(path: Path) -> Precision:
    """What an ONNX file is typed as: int8 or int8_fp16 if it quantises anything, else its narrowest float weights, initializers and constants.

    Raises:
        MissingDependency: onnx is not installed.
        ArtifactMismatch: the file is no ONNX model.
    """
    graph = _load_onnx(path).graph
    from onnx import TensorProto  # installed, or the file would not have been read

    constants = [attribute.t for node in graph.node if node.op_type == "Constant" for attribute in node.attribute if attribute.name == "value"]
    kinds = {tensor.data_type for tensor in (*graph.initializer, *constants)}
    if any(node.op_type.startswith(("QuantizeLinear", "DequantizeLinear", "QLinear")) for node in graph.node):
        return "int8_fp16" if TensorProto.FLOAT16 in kinds else "int8"
    if TensorProto.FLOAT16 in kinds:
        return "fp16"
    return "bf16" if TensorProto.BFLOAT16 in kinds else "fp32"


def _file(path: Path, backend: str | None) -> Target:
    run = next((folder for folder in (path.parent, path.parent.parent) if (folder / "report.json").is_file()), None)
    if path.name == WEIGHTS:
        return Target(path.parent.name, path, backend or TORCH, "fp32", run=run)
    if path.suffix == ".onnx":
        return Target(path.stem, path, backend or "onnxruntime", precision_of(path), run=run)
    if path.name.endswith(ENGINE_SUFFIXES):
        recorded = manifest.read(path)
        name = path.name.removesuffix(manifest.COMPRESSED).rpartition(".")[0]
        return Target(name, path, backend or recorded.vendor, recorded.precision, run=run)
    raise UsageError(f"'{path.name}' is no artifact (known: {', '.join(KNOWN_FILES)})", "give such a file, a run folder, or RUN:variant/backend/precision/b1")


def _recommended(run: Path, backend: str | None) -> Target:
    document = report.load(run)
    chosen = document.get("recommended")
    if not chosen:
        keys = ", ".join(dict.fromkeys(_address(row) for row in document["rows"] if row.get("artifact"))) or "none"
        raise UsageError(f"{run} recommends no artifact (it has: {keys})", f"name one: {run}:variant/backend/precision")
    return _of_row(run, document["rows"][chosen["row"]], backend)


def _row(run: Path, address: str, backend: str | None) -> Target:
    rows = report.load(run)["rows"]
    found = [row for row in rows if address in {summary.row_key(row), _address(row)}]
    if not found:
        raise UsageError(plugins.unknown("row", address, (summary.row_key(row) for row in rows)))
    row, target = found[0], _of_row(run, found[0], backend)
    if address != summary.row_key(row):
        return target
    threads = row.get("threads") if THREADS_OF_SWEEP.search(row.get("sweep") or "") else None
    return replace(target, batch=row["batch"], scenario=row.get("scenario") or "single_stream", threads=threads)


def _of_row(run: Path, row: Mapping[str, Any], backend: str | None) -> Target:
    """The artifact behind a row, its bytes checked against the report."""
    recorded = row.get("artifact")
    if recorded is None:
        raise UsageError(f"row '{summary.row_key(row)}' has no artifact to open ({row['status']}: {row.get('reason')})")
    kept = (row.get("verified") or {}).get("kept_in_float")
    target = Target(_address(row), run / recorded["path"], backend or row["backend"], row["precision"], row.get("options") or {}, run, kept_in_float=kept)
    if not target.path.is_file():
        raise ArtifactError(f"the artifact of row '{summary.row_key(row)}' is gone: {target.path}", "deployopt run RECIPE --run-dir RUN makes it again")
    Artifact(target.kind, target.path, recorded["sha256"], recorded["bytes"]).verified()
    return target


def _address(row: Mapping[str, Any]) -> str:
    return f"{row['variant']}/{row['backend']}/{row['precision']}"


def _onnx_description(path: Path) -> Description:
    model = _load_onnx(path)
    properties = {p.key: p.value for p in model.metadata_props}
    try:
        preprocessing = Preprocessing.from_json(json.loads(properties[PREPROCESSING_KEY])) if PREPROCESSING_KEY in properties else None
        classes = tuple(map(str, json.loads(properties[CLASSES_KEY]))) if CLASSES_KEY in properties else None
    except (KeyError, TypeError, ValueError) as exc:
        raise ArtifactMismatch(f"the metadata of {path.name} are not as deployopt writes them: {exc}", "deployopt run RECIPE --fresh --until export") from exc
    return Description(preprocessing, classes)


def _load_onnx(path: Path) -> ModelProto:
    try:
        import onnx
    except ImportError:
        raise MissingDependency("onnx", "runtimes", "to read an ONNX file") from None
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # comes with onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as exc:
        raise ArtifactMismatch(f"{path.name} is not an ONNX model: {exc}") from exc
    if not model.graph.output:
        raise ArtifactMismatch(f"{path.name} is not an ONNX model: it holds no graph")
    return model
