"""A model folder: what was saved is loaded, and what cannot be is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deployopt.errors import ArtifactCorrupt, ArtifactError, ArtifactMismatch
from deployopt.nn import checkpoint, macs, models, pruning
from deployopt.runtime.preprocessing import Preprocessing
from deployopt.runtime.progress import SilentProgress

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


def test_the_digest_covers_both_files(tmp_path: Path) -> None:
    artifact = checkpoint.save(tmp_path, network())
    _edit(tmp_path, note="the same weights")
    with pytest.raises(ArtifactCorrupt, match=r"model\.safetensors: wanted sha256"):
        artifact.verified()
    (tmp_path / checkpoint.DESCRIPTION).unlink()
    with pytest.raises(ArtifactCorrupt, match=r"model\.json is missing"):
        artifact.verified()


def test_a_pruned_network_goes_on_with_its_cuts_and_a_head_for_the_new_data(tmp_path: Path) -> None:
    net = network()
    pruning.prune(net, macs.count(net, net.input_shape)[1] // 2, metric="macs")
    checkpoint.save(tmp_path, net)
    log = Log()
    resumed = checkpoint.resume(tmp_path, 7, PREPROCESSING._replace(image_size=16), log)
    assert resumed.lineage == net.lineage
    assert resumed.base == {**net.base, "outputs": 7}
    assert resumed(torch.rand(2, 3, 16, 16)).shape == (2, 7)
    assert torch.equal(resumed.body.get_parameter("conv1.weight"), net.body.get_parameter("conv1.weight"))
    assert "its head has 5 outputs, 7 are wanted" in log.messages[0]
    pruning.prune(resumed, macs.count(net, net.input_shape)[1], metric="macs")
    assert [entry["op"] for entry in resumed.lineage] == ["prune", "prune"]


def test_a_quantised_network_goes_on_with_its_own_data_only(tmp_path: Path) -> None:
    net = network()
    net.lineage.append({"op": "quantize", "sites": {}, "scheme": {}})
    checkpoint.save(tmp_path, net)
    assert checkpoint.resume(tmp_path, 5, PREPROCESSING, SilentProgress()).lineage == net.lineage
    for outputs, preprocessing in ((7, PREPROCESSING), (5, PREPROCESSING._replace(std=(1.0, 1.0, 1.0)))):
        with pytest.raises(ArtifactMismatch, match="is quantised for 5 outputs"):
            checkpoint.resume(tmp_path, outputs, preprocessing, SilentProgress())


class Log(SilentProgress):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def log(self, message: str) -> None:
        self.messages.append(message)


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


def test_a_module_with_two_names_is_written_under_both(tmp_path: Path) -> None:
    net = network()
    net.body.also = net.body.layer1
    checkpoint.save(tmp_path, net)
    found = load_file(tmp_path / checkpoint.WEIGHTS)
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())
