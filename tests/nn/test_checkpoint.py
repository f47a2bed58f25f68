"""A model folder: what was saved is loaded, and what cannot be is named."""

import json
from pathlib import Path

import pytest
import torch

from deployopt.errors import ArtifactError, ArtifactMismatch
from deployopt.nn import checkpoint, models
from deployopt.runtime.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(8, 3, 10, (0.5, 0.4, 0.3), (0.25, 0.5, 1.0))


def network(arch: str = "resnet20") -> models.Network:
    torch.manual_seed(0)
    return models.build({"arch": arch, "outputs": 5}, PREPROCESSING)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    net = network().train()
    net(torch.rand(4, 3, 8, 8))  # BatchNorm statistics that differ from a new network's
    checkpoint.save(tmp_path, net)
    return tmp_path


def test_a_loaded_network_computes_the_same_bits(saved: Path) -> None:
    original = network().train()
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    loaded = checkpoint.load(saved)
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.training
    assert loaded.preprocessing == PREPROCESSING
    assert loaded.base == original.base
    checkpoint.save(saved / "again", loaded)
    assert (saved / "again" / checkpoint.WEIGHTS).read_bytes() == (saved / checkpoint.WEIGHTS).read_bytes()
    with torch.inference_mode():
        assert torch.equal(loaded(x), checkpoint.load(saved / "again")(x))


def test_the_artifact_says_what_the_network_takes_and_gives(tmp_path: Path) -> None:
    artifact = checkpoint.save(tmp_path, network())
    assert (artifact.kind, artifact.path.name) == ("torch", checkpoint.WEIGHTS)
    assert artifact.inputs[0].shape == ("batch", 3, 8, 8)
    assert artifact.outputs[0].shape == ("batch", 5)
    assert artifact.verified() == artifact
    description = json.loads((tmp_path / checkpoint.DESCRIPTION).read_text())
    assert description["base"]["arch"] == "resnet20"
    assert description["lineage"] == []


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "model.json").unlink(), ArtifactError, r"model\.json cannot be read"),
        (lambda f: (f / "model.json").write_text("{"), ArtifactError, r"model\.json cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), ArtifactError, r"model\.safetensors cannot be read"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]), ArtifactError, r"model\.safetensors cannot be read"),
        (lambda f: _edit(f, schema=99), ArtifactMismatch, "schema 99, this deployopt reads 1"),
        (lambda f: _edit(f, lineage=[{"op": "sparsify"}]), ArtifactMismatch, "the lineage holds 'sparsify'"),
        (lambda f: _edit(f, base={"arch": "resnet32", "outputs": 5}), ArtifactMismatch, r"does not fit model\.json"),
    ],
)
def test_a_damaged_folder_is_refused(saved: Path, damage, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    damage(saved)
    with pytest.raises(error, match=message):
        checkpoint.load(saved)


def _edit(folder: Path, **changes: object) -> None:
    path = folder / checkpoint.DESCRIPTION
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
