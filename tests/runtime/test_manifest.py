import json

import pytest

from deployopt.errors import ArtifactCorrupt, ArtifactMismatch
from deployopt.runtime import manifest
from deployopt.runtime.cuda import Gpu
from deployopt.runtime.hashing import sha256_bytes
from deployopt.runtime.preprocessing import Preprocessing
from deployopt.runtime.session import TensorSpec

AMPERE = Gpu("NVIDIA GeForce RTX 3090", "8.6", "13.0", "580.65.06")


def describe(plan, **changes):
    base = manifest.Manifest(
        sha256=sha256_bytes(plan),
        size_bytes=len(plan),
        vendor="tensorrt_rtx",
        version="1.7.1.116",
        cuda="13.2",
        platform=manifest.this_platform(),
        compute_capabilities=("8.6", "8.9"),
        gpu=None,
        precision="int8",
        profiles=({"input": {"min": (1, 3, 32, 32), "opt": (8, 3, 32, 32), "max": (8, 3, 32, 32)}},),
        inputs=(TensorSpec("input", ("batch", 3, 32, 32), "float32"),),
        outputs=(TensorSpec("logits", ("batch", 10), "float32"),),
        onnx_sha256="0" * 64,
        options={"batch_sizes": [1, 8]},
    )
    return base._replace(**changes)


def put(folder, name="model.engine", plan=b"plan", **changes):
    engine = folder / name
    engine.write_bytes(plan)
    manifest.write(engine, describe(plan, **changes))
    return engine


@pytest.mark.parametrize("changes", [{}, {"gpu": AMPERE, "preprocessing": Preprocessing(32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))}, {"profiles": ()}])
def test_written_is_read_back(tmp_path, changes):
    assert manifest.read(put(tmp_path, **changes)) == describe(b"plan", **changes)


def opened(engine):
    """Every check, as a backend makes them on opening an engine."""
    found, plan = manifest.read_engine(engine)
    manifest.check_version(engine, found, "tensorrt_rtx", "1.7.1.116")
    manifest.check_gpu(engine, found, AMPERE)
    return found, plan


def test_an_engine_that_fits_passes_with_its_bytes(tmp_path):
    found, plan = opened(put(tmp_path))
    assert (found.precision, plan) == ("int8", b"plan")


def test_a_compressed_engine_is_read_as_what_it_holds(tmp_path):
    plan = b"__global__ void kernel() {}" * 10_000
    engine = tmp_path / "model.engine.xz"
    engine.write_bytes(manifest.compressed(plan))
    manifest.write(engine, describe(plan))
    assert engine.stat().st_size < len(plan) / 100
    assert manifest.path_of(engine).name == "model.engine.xz.json"
    assert opened(engine)[1] == plan


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (b"this is no xz file", "cannot be decompressed"),
        (manifest.compressed(b"a plan that is cut")[:-20], "the file changed"),
        (manifest.compressed(b"plaN"), r"\(4 bytes\), found .* \(4 bytes\)"),
        (manifest.compressed(bytes(10**8)), r"\(4 bytes\), found .* \(5 bytes\)"),
        (b"", "is empty"),
    ],
)
def test_a_compressed_engine_that_holds_something_else(tmp_path, stored, said):
    """Nothing beyond the size that the manifest tells is unpacked."""
    engine = tmp_path / "model.engine.xz"
    engine.write_bytes(stored)
    manifest.write(engine, describe(b"plan"))
    with pytest.raises(ArtifactCorrupt, match=said):
        manifest.read_engine(engine)


def test_flipped_byte(tmp_path):
    engine = put(tmp_path)
    engine.write_bytes(b"plaN")
    with pytest.raises(ArtifactCorrupt, match="the file changed, or the manifest belongs to another engine") as caught:
        manifest.read_engine(engine)
    assert "deployopt run" in caught.value.remedy


def test_swapped_manifest(tmp_path):
    first, second = put(tmp_path, "a.engine", b"one"), put(tmp_path, "b.engine", b"two!")
    manifest.path_of(first).replace(manifest.path_of(second))
    with pytest.raises(ArtifactCorrupt, match=r"b\.engine: its manifest wants sha256 .* \(3 bytes\), found .* \(4 bytes\)"):
        manifest.read_engine(second)


def test_empty_engine(tmp_path):
    engine = put(tmp_path)
    engine.write_bytes(b"")
    with pytest.raises(ArtifactCorrupt, match="is empty; its manifest says 4 bytes"):
        manifest.read_engine(engine)


def test_missing_engine_and_missing_manifest(tmp_path):
    engine = put(tmp_path)
    engine.unlink()
    with pytest.raises(ArtifactCorrupt, match="missing beside its manifest"):
        manifest.read_engine(engine)
    with pytest.raises(ArtifactCorrupt, match="nothing vouches for it"):
        manifest.read_engine(tmp_path / "other.engine")


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"schema": 2}', '{"schema": 2, "inputs": 3}', "\udcff"])
def test_unreadable_manifest(tmp_path, text):
    engine = put(tmp_path)
    manifest.path_of(engine).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ArtifactCorrupt, match="is not a manifest of deployopt"):
        manifest.read(engine)


def test_manifest_of_another_schema(tmp_path):
    engine = put(tmp_path)
    data = json.loads(manifest.path_of(engine).read_text())
    manifest.path_of(engine).write_text(json.dumps({**data, "schema": 1}))
    with pytest.raises(ArtifactMismatch, match="schema 1; this deployopt reads schema 2") as caught:
        manifest.read(engine)
    assert caught.value.remedy == manifest.rebuild(engine)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "1.5.0.1"}, r"was built by tensorrt_rtx 1\.5\.0\.1 on .*; here is tensorrt_rtx 1\.7\.1\.116"),
        ({"vendor": "tensorrt", "version": "10.13"}, r"was built by tensorrt 10\.13 on"),
        ({"platform": "windows-amd64"}, "on windows-amd64; here is"),
        ({"compute_capabilities": ("8.9", "12.0")}, r"built for compute capability 8\.9, 12\.0; here is NVIDIA GeForce RTX 3090 with compute capability 8\.6"),
    ],
)
def test_an_engine_for_another_machine_is_refused(tmp_path, changes, message):
    folder = tmp_path / "no" / "run"
    folder.mkdir(parents=True)
    engine = put(folder, **changes)
    with pytest.raises(ArtifactMismatch, match=message) as caught:
        opened(engine)
    assert "deployopt run RECIPE --until build  # on this machine" in caught.value.remedy


def test_tensorrts_kernels_were_chosen_by_timing_one_gpu_model(tmp_path):
    engine = put(tmp_path, vendor="tensorrt", gpu=AMPERE)
    found = manifest.read(engine)
    manifest.check_gpu(engine, found, AMPERE._replace(driver="590.1"))
    with pytest.raises(ArtifactMismatch, match=r"built and timed on NVIDIA GeForce RTX 3090; here is NVIDIA A10, also of compute capability 8\.6"):
        manifest.check_gpu(engine, found, AMPERE._replace(name="NVIDIA A10"))
    manifest.check_gpu(engine, found._replace(vendor="tensorrt_rtx"), AMPERE._replace(name="NVIDIA A10"))  # chooses its kernels where it runs


def test_a_recipes_folder_may_have_a_space(tmp_path):
    (tmp_path / "my runs").mkdir()
    (tmp_path / "my runs" / "recipe.yaml").write_text("name: a")
    assert manifest.rebuild(tmp_path / "my runs" / "a.engine") == f"deployopt run '{tmp_path}/my runs/recipe.yaml' --until build"


def test_in_a_run_folder_the_remedy_is_the_very_command(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: a")
    (tmp_path / "07-build").mkdir()
    engine = put(tmp_path / "07-build")
    engine.write_bytes(b"plaN")
    with pytest.raises(ArtifactCorrupt) as caught:
        manifest.read_engine(engine)
    assert caught.value.remedy == f"deployopt run {tmp_path / 'recipe.yaml'} --until build"


def test_bytes_are_checked_first_then_version_then_gpu(tmp_path):
    engine = put(tmp_path, version="1.5", compute_capabilities=("12.0",))
    with pytest.raises(ArtifactMismatch, match=r"1\.5"):
        opened(engine)
    engine.write_bytes(b"plaN")
    with pytest.raises(ArtifactCorrupt):
        opened(engine)


@pytest.mark.parametrize(
    ("vendor", "cuda", "package"),
    [("tensorrt", "12.9", "tensorrt-cu12"), ("tensorrt", "13.2", "tensorrt"), ("tensorrt", None, "tensorrt"), ("tensorrt_rtx", "12.9", "tensorrt-rtx-cu13")],
)
def test_the_package_of_another_version_is_the_one_for_the_engines_cuda(tmp_path, vendor, cuda, package):
    described = describe(b"plan", vendor=vendor, cuda=cuda, version="11.2.1")
    with pytest.raises(ArtifactMismatch) as caught:
        manifest.check_version(tmp_path / "a.engine", described, vendor, "11.4.0")
    assert caught.value.remedy.endswith(f"  # on this machine, or: pip install '{package}==11.2.1'")
