"""The manifest beside an engine (`model.engine` → `model.engine.json`): what it is and where it fits, known before it is deserialised.

An engine is native code for one version of one vendor's library, one GPU class and one platform, so nothing is loaded that its
manifest does not vouch for.
"""

import json
import platform
from pathlib import Path
from shlex import quote
from typing import Any, Dict, Mapping, NamedTuple, Optional, Tuple

from deployopt.errors import ArtifactCorrupt, ArtifactMismatch
from deployopt.runtime.cuda import Gpu
from deployopt.runtime.files import atomic_write_json
from deployopt.runtime.hashing import sha256_bytes
from deployopt.runtime.preprocessing import Preprocessing
from deployopt.runtime.session import TensorSpec

SCHEMA = 2
COMPRESSED = ".xz"  # ends the name of an engine that is stored compressed
_PACKAGES = {"tensorrt_rtx": "tensorrt-rtx-cu13"}  # where a vendor's module comes from, if not from a package of its name: as our extras have it
Profile = Mapping[str, Mapping[str, Tuple[int, ...]]]  # input → {"min", "opt", "max"}: shape
REBUILD = "deployopt run RECIPE --fresh --until build"  # where the library refuses an engine that its manifest vouches for


class Manifest(NamedTuple):
    """What is known of an engine.

    Attributes:
        sha256, size_bytes: of the engine itself, also where its file is compressed.
        vendor, version: the module that built it ("tensorrt", "tensorrt_rtx") and its version.
        cuda: version of the CUDA runtime library there; None if none was found.
        platform: operating system and machine type, e.g. "linux-x86_64".
        compute_capabilities: GPU classes it runs on, e.g. ("8.6", "8.9").
        gpu: the GPU it was built on, with its driver; None if it was built ahead of time without one.
        precision: asked for, as typed in the graph.
        profiles: optimisation profiles.
        inputs, outputs: specs in the engine's order.
        onnx_sha256: of the ONNX it was built from.
        options: that it was built with.
        preprocessing: of its input images, if the ONNX says so.
    """

    sha256: str
    size_bytes: int
    vendor: str
    version: str
    cuda: Optional[str]
    platform: str
    compute_capabilities: Tuple[str, ...]
    gpu: Optional[Gpu]
    precision: str
    profiles: Tuple[Profile, ...]
    inputs: Tuple[TensorSpec, ...]
    outputs: Tuple[TensorSpec, ...]
    onnx_sha256: str
    options: Mapping[str, Any]
    preprocessing: Optional[Preprocessing] = None

    def to_json(self) -> Dict[str, Any]:
        gpu = self.gpu._asdict() if self.gpu else None
        return {"schema": SCHEMA, **self._asdict(), "gpu": gpu, "preprocessing": self.preprocessing.to_json() if self.preprocessing else None}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Manifest":
        """Raises KeyError, TypeError or ValueError where `data` is not a manifest."""
        fields = {name: data[name] for name in Manifest._fields}
        for name in ("inputs", "outputs"):
            fields[name] = tuple(TensorSpec(tensor, tuple(shape), dtype) for tensor, shape, dtype in data[name])
        fields["compute_capabilities"] = tuple(data["compute_capabilities"])
        fields["profiles"] = tuple(
            {tensor: {bound: tuple(shape) for bound, shape in ranges.items()} for tensor, ranges in profile.items()} for profile in data["profiles"]
        )
        fields["gpu"] = Gpu(**data["gpu"]) if data["gpu"] else None
        fields["preprocessing"] = Preprocessing.from_json(data["preprocessing"]) if data["preprocessing"] else None
        return Manifest(**fields)


def this_platform() -> str:
    """Operating system and machine type, as engines distinguish them."""
    return f"{platform.system()}-{platform.machine()}".lower()


def rebuild(engine: Path) -> str:
    """The command that builds it again where it is: what has not changed since comes from the cache."""
    recipes = [folder / "recipe.yaml" for folder in (engine.parent, engine.parent.parent)]  # of the run folder, if it lies in one
    return f"deployopt run {next((quote(str(recipe)) for recipe in recipes if recipe.is_file()), 'RECIPE')} --until build"


def path_of(engine: Path) -> Path:
    """Where an engine's manifest lies."""
    return engine.with_name(engine.name + ".json")


def write(engine: Path, manifest: Manifest) -> None:
    """Write the manifest of an engine that is already in place: the engine counts from now on."""
    atomic_write_json(path_of(engine), manifest.to_json())


def read(engine: Path) -> Manifest:
    """The manifest beside an engine.

    Raises:
        ArtifactCorrupt: there is none, or it cannot be read.
    """
    beside = path_of(engine)
    try:
        data = json.loads(beside.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ArtifactMismatch(f"{beside.name}: a manifest of schema {data['schema']}; this deployopt reads schema {SCHEMA}", rebuild(engine))
        return Manifest.from_json(data)
    except FileNotFoundError as exc:
        raise ArtifactCorrupt(f"{engine.name}: its manifest {beside.name} is missing, so nothing vouches for it", rebuild(engine)) from exc
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise ArtifactCorrupt(f"{beside.name} is not a manifest of deployopt ({type(exc).__name__}: {exc})", rebuild(engine)) from exc


def read_engine(engine: Path) -> Tuple[Manifest, bytes]:
    """The manifest, and the very bytes that it vouches for.

    Raises:
        ArtifactCorrupt: the engine is missing, empty, or not the one described.
        ArtifactMismatch: the manifest was written by another deployopt.
    """
    manifest = read(engine)
    try:
        stored = engine.read_bytes()
    except FileNotFoundError as exc:
        raise ArtifactCorrupt(f"{engine.name} is missing beside its manifest", rebuild(engine)) from exc
    if not stored:
        raise ArtifactCorrupt(f"{engine.name} is empty; its manifest says {manifest.size_bytes} bytes", rebuild(engine))
    plan = _decompressed(engine, stored, manifest.size_bytes) if engine.suffix == COMPRESSED else stored
    found = sha256_bytes(plan)
    if found != manifest.sha256:
        raise ArtifactCorrupt(
            f"{engine.name}: its manifest wants sha256 {manifest.sha256[:12]}… ({manifest.size_bytes} bytes), found {found[:12]}… ({len(plan)} bytes): "
            "the file changed, or the manifest belongs to another engine",
            rebuild(engine),
        )
    return manifest, plan


def compressed(plan: bytes) -> bytes:
    """An engine as a file that ends in `COMPRESSED` holds it."""
    import lzma

    return lzma.compress(plan)


def _decompressed(engine: Path, stored: bytes, size: int) -> bytes:
    """What a compressed file holds, of which no more than a byte beyond `size` is looked at."""
    import lzma

    try:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(stored, max_length=size + 1)
    except (lzma.LZMAError, EOFError) as exc:
        raise ArtifactCorrupt(f"{engine.name} cannot be decompressed: {exc}", rebuild(engine)) from exc


def _package(manifest: Manifest) -> str:
    """That holds the library which built the engine. `tensorrt` is the package for CUDA 13."""
    if manifest.vendor == "tensorrt" and (manifest.cuda or "").startswith("12."):
        return "tensorrt-cu12"
    return _PACKAGES.get(manifest.vendor, manifest.vendor)


def check_version(engine: Path, manifest: Manifest, vendor: str, version: str) -> None:
    """Refuse an engine of another vendor, version or platform than these.

    Raises:
        ArtifactMismatch: says what is here, what the engine wants, and the command that rebuilds.
    """
    wanted, here = f"{manifest.vendor} {manifest.version} on {manifest.platform}", f"{vendor} {version} on {this_platform()}"
    if wanted != here:
        install = f", or: pip install '{_package(manifest)}=={manifest.version}'" if manifest.platform == this_platform() else ""
        raise ArtifactMismatch(f"{engine.name} was built by {wanted}; here is {here}", f"{rebuild(engine)}  # on this machine{install}")


def check_gpu(engine: Path, manifest: Manifest, gpu: Gpu) -> None:
    """Refuse an engine built for other GPU classes than this GPU's, and one of TensorRT for another model: its kernels were chosen by timing that one.

    Raises:
        ArtifactMismatch: says what is here, what the engine wants, and the command that rebuilds.
    """
    if gpu.compute_capability not in manifest.compute_capabilities:
        raise ArtifactMismatch(
            f"{engine.name} was built for compute capability {', '.join(manifest.compute_capabilities)}; "
            f"here is {gpu.name} with compute capability {gpu.compute_capability}",
            f"{rebuild(engine)}  # on this machine, whose GPU is then the target",
        )
    if manifest.vendor == "tensorrt" and manifest.gpu is not None and manifest.gpu.name != gpu.name:
        raise ArtifactMismatch(
            f"{engine.name} was built and timed on {manifest.gpu.name}; here is {gpu.name}, also of compute capability {gpu.compute_capability}",
            f"{rebuild(engine)}  # on this machine, whose GPU is then the target",
        )
