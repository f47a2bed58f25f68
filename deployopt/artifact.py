"""The value types that travel between rooms. References and figures only, never a live module."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deployopt.errors import ArtifactCorrupt, ArtifactError, ArtifactMismatch, MissingDependency
from deployopt.runtime.hashing import sha256_file, sha256_json
from deployopt.runtime.session import TensorSpec

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

Precision = Literal["fp32", "fp16", "bf16", "int8", "int8_fp16"]
FLOAT_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
INT8_PRECISIONS: tuple[Precision, ...] = ("int8", "int8_fp16")  # by what is not INT8: FP32 or FP16
ArtifactKind = Literal["torch", "onnx", "engine"]
RowStatus = Literal["ok", "built", "unavailable", "failed", "invalid"]
TORCH, TORCH_COMPILE = "torch", "torch-compile"  # backends of rows for orientation: PyTorch runs the variant itself, and nothing is built
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"  # of a torch model's folder
DESCRIPTION_SCHEMA = 1


def digest(kind: ArtifactKind, path: Path) -> str:
    """sha256 of an artifact's file; where it has others beside it without which it means nothing, over all files' sha256 by name.

    Those are a torch model's description, and the files of weights that an ONNX refers to.

    Raises:
        ArtifactCorrupt: a file of weights is missing. MissingDependency: onnx is not installed.
    """
    return _digest(_files(kind, path))


def _digest(files: Mapping[str, Path]) -> str:
    hashes = {name: sha256_file(file) for name, file in files.items()}
    return next(iter(hashes.values())) if len(hashes) == 1 else sha256_json(hashes)


def _files(kind: ArtifactKind, path: Path) -> dict[str, Path]:
    """All that an artifact consists of, by name."""
    if kind == "torch":
        return {name: path.with_name(name) for name in (WEIGHTS, DESCRIPTION)}
    return {path.name: path, **(external_weights(path) if kind == "onnx" else {})}


def external_weights(path: Path) -> dict[str, Path]:
    """Files that hold tensors of an ONNX file, by the names that it has for them, sorted; {} where it holds all itself, or is no ONNX: who opens it says so.

    Source: onnx.proto, TensorProto.external_data: "location" is relative to the ONNX file's folder.

    Raises:
        ArtifactCorrupt: one is missing. MissingDependency: onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise MissingDependency("onnx", "runtimes", "to read which files an ONNX file refers to") from None
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # comes with onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError:
        return {}
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    stored = [tensor for tensor in (*model.graph.initializer, *_attribute_tensors(nodes)) if tensor.data_location == onnx.TensorProto.EXTERNAL]
    names = sorted({entry.value for tensor in stored for entry in tensor.external_data if entry.key == "location"})
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise ArtifactCorrupt(f"{path.name}: it keeps weights in {', '.join(missing)}, missing from its folder", f"put {missing[0]} beside {path.name}")
    return {name: path.parent / name for name in names}


def _attribute_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    """Tensors in the attributes of nodes, and in the graphs that are attributes."""
    for attribute in (a for node in nodes for a in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for graph in (attribute.g, *attribute.graphs):
            yield from graph.initializer
            yield from _attribute_tensors(graph.node)


def read_description(folder: Path) -> dict[str, Any]:
    """A torch model's base, preprocessing and lineage.

    Raises:
        ArtifactError: no readable model.json.
        ArtifactMismatch: another schema.
    """
    path = folder / DESCRIPTION
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema, _ = description.get("schema"), (description["base"], description["preprocessing"], description["lineage"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ArtifactError(f"{path} cannot be read: {exc}", f"a torch model is a folder with {WEIGHTS} and {DESCRIPTION}") from exc
    if schema != DESCRIPTION_SCHEMA:
        raise ArtifactMismatch(f"{path} has schema {schema}, this deployopt reads {DESCRIPTION_SCHEMA}", "use the deployopt version that wrote it")
    return description


@dataclass(frozen=True)
class Artifact:
    """A file (or, for kind "torch", a folder's model.safetensors + model.json) that a step made.

    Attributes:
        path: where it lies now.
        sha256: see `digest`.
        size_bytes: of the file, with the files of weights that an ONNX refers to; for "torch" of model.safetensors.
        inputs, outputs: specs with named dynamic axes.
        metadata: facts recorded by the maker (precision, opset, verified layers, build seconds …).
    """

    kind: ArtifactKind
    path: Path
    sha256: str
    size_bytes: int
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(kind: ArtifactKind, path: Path, **facts: Any) -> Artifact:
        """Reference a file that exists: hashes it and takes its size. Raises as `digest`."""
        files = _files(kind, path)
        sized = [path] if kind == "torch" else files.values()
        return Artifact(kind, path, _digest(files), sum(file.stat().st_size for file in sized), **facts)

    def verified(self) -> Artifact:
        """This artifact, after its bytes were hashed again.

        Raises:
            ArtifactCorrupt: the bytes on disk are not the recorded ones, or a file is gone, or only a part of them was recorded.
        """
        try:
            found = digest(self.kind, self.path)
        except FileNotFoundError as exc:
            raise ArtifactCorrupt(f"{self.path.name}: {Path(exc.filename).name} is missing", "deployopt run RECIPE --fresh rebuilds it") from exc
        if found != self.sha256 and self.kind == "onnx" and sha256_file(self.path) == self.sha256:
            beside = ", ".join(external_weights(self.path))
            raise ArtifactCorrupt(
                f"{self.path.name} is as recorded, by a version of deployopt whose sha256 left out its files of weights ({beside}): nothing vouches for those",
                "deployopt run RECIPE --fresh builds it anew and records them too",
            )
        if found != self.sha256:
            raise ArtifactCorrupt(f"{self.path.name}: wanted sha256 {self.sha256[:12]}…, found {found[:12]}…", "deployopt run RECIPE --fresh rebuilds it")
        return self

    def to_json(self, relative_to: Path) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "path": self.path.relative_to(relative_to).as_posix(),
            "sha256": self.sha256,
            "size_bytes": self.size_bytes,
            "inputs": [list(s) for s in self.inputs],
            "outputs": [list(s) for s in self.outputs],
            "metadata": dict(self.metadata),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any], relative_to: Path) -> Artifact:
        def specs(rows: list[list[Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in rows)

        return Artifact(
            data["kind"], relative_to / data["path"], data["sha256"], data["size_bytes"], specs(data["inputs"]), specs(data["outputs"]), data["metadata"]
        )


NOT_VERIFIED = "INT8 is not verified"  # begins the note of a row whose layers nobody could tell


@dataclass(frozen=True)
class Verified:
    """What a built model really runs, read from the runtime's own graph.

    Attributes:
        quantized_layers: convolutions and matrix products executed in INT8.
        quantizable_layers: all convolutions and matrix products.
        executed: those by executed precision, e.g. {"int8": 20, "fp32": 1}.
    """

    quantized_layers: int
    quantizable_layers: int
    executed: Mapping[str, int] = field(default_factory=dict)


def quantized_share(verified: Mapping[str, Any] | None) -> float | None:
    """Share (0–1) of the layers that should run in INT8 that do: of all quantizable ones but those that mixed_precision keeps in float.

    Args:
        verified: as in `Row`; records of earlier versions may lack "kept_in_float".

    Returns:
        None where it cannot be told, or no layer should.
    """
    wanted = verified["quantizable_layers"] - verified.get("kept_in_float", 0) if verified else 0
    return min(1.0, verified["quantized_layers"] / wanted) if verified and wanted > 0 else None


@dataclass(frozen=True)
class Availability:
    """Whether a backend works here.

    Attributes:
        runs: sessions can be opened and timed on this machine.
        builds: artifacts can be built on this machine.
        version: of the runtime, None if it is not installed.
        device: what executes, e.g. "CPU" or "NVIDIA H100".
        reason: why it does not run (or not build); None when all is well.
        precisions: precision → None if it is really executed as asked, else the reason it is not offered.
        remedy: what to install or do for it to run here; None where nothing is known to help.
    """

    runs: bool
    builds: bool
    version: str | None
    device: str | None
    reason: str | None
    precisions: Mapping[str, str | None] = field(default_factory=dict)
    remedy: str | None = None

    @property
    def explanation(self) -> str | None:
        """The reason and its remedy on one line."""
        return f"{self.reason}: {self.remedy}" if self.reason and self.remedy else self.reason

    def obstacle(self, backend: str, precision: str, *, to_run: bool = False) -> str | None:
        """Why `backend`, which this is of, does not build (and, `to_run`, run) this precision here; None if it does."""
        if not self.builds or (to_run and not self.runs):
            return self.explanation or f"{backend} does not work on this machine and does not say why"
        if precision not in self.precisions:
            return f"{backend} does not know the precision {precision} (it has: {', '.join(self.precisions)})"
        return self.precisions[precision]


@dataclass
class Row:
    """One line of a report: an entry of report.json's "rows". Fields are JSON as they are; None where not measured."""

    variant: str
    backend: str
    precision: str
    batch: int
    status: RowStatus
    target: str = "local"
    provider: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None
    scenario: str = "single_stream"  # or "offline"
    sweep: str = ""  # what sets it apart from the run's own single stream: "", "t1", "offline", "offline-t1"
    reason: str | None = None
    notes: list[str] = field(default_factory=list)  # what a reader should know of a row that counts all the same
    artifact: dict[str, Any] | None = None  # {"path", "sha256", "bytes"}
    accuracy: dict[str, Any] | None = None  # {"primary": "top1", "top1", "n", "agreement", "max_abs_diff", …}
    verified: dict[str, Any] | None = None  # {"quantized_layers", "quantizable_layers", "executed", "kept_in_float": of the quantizable, on purpose}
    fusion: dict[str, Any] | None = None  # of an engine: {"adds", "fused_adds", "int8_to_float", "reformats", "layers"}; see `tensorrt_layers.Execution`
    parity: dict[str, Any] | None = None  # an engine's outputs against ONNX Runtime's: {"checked", "widened", "n", "agreement", "max_abs_diff", their limits}
    latency_ms: dict[str, Any] | None = None  # {"host": {"n", "p50", …}, "device": … | None}
    samples: str | None = None  # file of raw block medians, relative to the run folder
    noise: dict[str, Any] | None = None  # A/A repeats: {"p50_ms", "peak_memory_bytes": one a process lifetime, "same_rounds": ratios of two in the same rounds}
    throughput_per_s: float | None = None
    throughput_ci95: list[float] | None = None
    peak_memory_bytes: int | None = None  # of the process
    device_memory_bytes: int | None = None  # of the process on its GPU
    speedup: float | None = None  # against the dense FP32 row of the same backend and batch
    speedup_ci95: list[float] | None = None
    speedup_best_float: float | None = None  # against that variant's best float row on the same backend and batch
    speedup_best_float_ci95: list[float] | None = None
    profile: dict[str, Any] | None = None  # where its time goes: see `bench.profiles.summarize`
    contract: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        """The row's address inside a run: variant/backend/precision/bN, and /SWEEP where it is not the run's own single stream."""
        return f"{self.variant}/{self.backend}/{self.precision}/b{self.batch}" + (f"/{self.sweep}" if self.sweep else "")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
