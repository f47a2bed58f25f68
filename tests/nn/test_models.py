"""Networks by name, and weights from files."""

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from deployopt.errors import ArtifactError, ArtifactMismatch, DataNotFound, UsageError
from deployopt.nn import ARCHITECTURES, CIFAR_ARCHITECTURES, TORCHVISION_ARCHITECTURES, checkpoint, models
from deployopt.nn.capture import capture
from deployopt.runtime.preprocessing import Preprocessing
from deployopt.runtime.progress import SilentProgress

PREPROCESSING = Preprocessing(16, 3, None, (0.5, 0.4, 0.3), (0.25, 0.5, 1.0))


def network(arch: str = "resnet20", outputs: int = 5, weights: Path | None = None, **base: object) -> models.Network:
    torch.manual_seed(0)
    return models.build({"arch": arch, "outputs": outputs, **base}, PREPROCESSING, None if weights is None else str(weights))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_listed_architecture_is_built(arch: str) -> None:
    with torch.device("meta"):  # shapes only
        made = network(arch)
        assert made.eval()(torch.empty(2, 3, 32, 32)).shape == (2, 5)
    assert made.base == {"arch": arch, "stem": "cifar" if arch in CIFAR_ARCHITECTURES else "imagenet", "outputs": 5, "options": {}}


@pytest.mark.parametrize(("stem", "size"), [("imagenet", 4), ("small", 8), ("cifar", 16)])
def test_a_stem_sets_the_resolution_of_the_first_stage(stem: str, size: int) -> None:
    with torch.device("meta"):
        body = network("resnet18", stem=stem).body
        features = body.maxpool(body.conv1(torch.empty(1, 3, 16, 16)))
    assert features.shape == (1, 64, size, size)


def test_the_image_is_normalised_inside() -> None:
    x = torch.rand(2, 3, 16, 16)
    expected = (x - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / torch.tensor([0.25, 0.5, 1.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(network().normalize(x), expected)


@pytest.mark.parametrize(("arch", "stem"), [("resnet20", None), ("resnet18", "imagenet"), ("resnet18", "small")])
def test_grey_images_have_one_input_channel(arch: str, stem: str | None) -> None:
    grey = Preprocessing(16, 1, None, (0.5,), (0.25,))
    with torch.device("meta"):
        assert models.build({"arch": arch, "stem": stem, "outputs": 4}, grey).eval()(torch.empty(2, 1, 16, 16)).shape == (2, 4)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"arch": "resnet21"}, r"resnet21.*resnet20"),
        ({"arch": "resnet18", "stem": "smal"}, r"smal.*small"),
        ({"arch": "resnet20", "stem": "imagenet"}, "stem cifar only"),
        ({"arch": "resnet20", "options": {"width": 2}}, r"does not take these model.options: \['width'\]"),
        ({"arch": "resnet18", "options": {"width": 2}}, r"does not take these model.options: \['width'\]"),
    ],
)
def test_what_cannot_be_built_is_said(base: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){message}"):
        models.build({"outputs": 3, **base}, PREPROCESSING)


def test_options_reach_the_architecture() -> None:
    with torch.device("meta"):
        assert network("resnet18", options={"zero_init_residual": True}).base["options"] == {"zero_init_residual": True}


def test_a_third_partys_model_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[deployopt.models]\ntinynet = their_models:TinyNet\n")
    (tmp_path / "their_models.py").write_text(
        "from torch import nn\n"
        "class TinyNet(nn.Sequential):\n"
        "    def __init__(self, num_outputs, width=4):\n"
        "        super().__init__(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_outputs))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    made = network("tinynet", options={"width": 6})
    assert made(torch.rand(2, 3, 16, 16)).shape == (2, 5)
    assert made.body[0].out_channels == 6


def test_a_third_partys_model_is_told_of_the_data_what_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def flat(num_outputs: int, channels: int, image_size: int = 32, hidden: int = 3) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, hidden), nn.Linear(hidden, num_outputs))

    monkeypatch.setattr(models.plugins, "names", lambda kind: ["flat"])
    monkeypatch.setattr(models.plugins, "find", lambda kind, name: flat)
    grey = Preprocessing(12, 1, None, (0.5,), (0.5,))
    for options in ({}, {"hidden": 2}, {"channels": 1}):
        made = models.build({"arch": "flat", "outputs": 5, "options": options}, grey)
        assert made(torch.rand(2, 1, 12, 12)).shape == (2, 5)
        assert made.base["options"] == options
    with pytest.raises(UsageError, match=r"model\.options\.image_size is 32, and the data have 12") as caught:
        models.build({"arch": "flat", "outputs": 5, "options": {"image_size": 32}}, grey)
    assert caught.value.remedy == "remove model.options.image_size"


Scored = namedtuple("Scored", ["logits", "aux"])


class Returning(nn.Module):
    """Returns its logits in some form."""

    def __init__(self, form: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.form, self.head = form, nn.Linear(3, 5)

    def forward(self, x: Tensor) -> object:
        return self.form(self.head(x.mean((2, 3))))


@pytest.mark.parametrize(
    ("form", "found"),
    [
        (lambda y: {"logits": y, "aux": [y, None]}, r"dict of logits \(Tensor \[2, 5\]\), aux \(list of Tensor \[2, 5\], NoneType\)"),
        (lambda y: (y, y), r"tuple of Tensor \[2, 5\], Tensor \[2, 5\]"),
        (lambda y: Scored(y, y), r"Scored of logits \(Tensor \[2, 5\]\), aux"),
        (lambda y: y[..., None, None], r"Tensor \[2, 5, 1, 1\]"),
    ],
)
def test_a_network_that_returns_more_than_logits_is_refused(form: Callable[[Tensor], object], found: str) -> None:
    made = models.Network(Returning(form), {"arch": "theirs", "outputs": 5}, PREPROCESSING)
    with pytest.raises(UsageError, match=rf"theirs must return one tensor \[N, 5\]; in training mode it returned a {found}"):
        made(torch.rand(2, 3, 16, 16))
    with pytest.raises(UsageError, match=r"in evaluation mode it returned a"):
        capture(made, torch.rand(2, 3, 16, 16))


class Log(SilentProgress):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def log(self, message: str) -> None:
        self.messages.append(message)


def _write_pth(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, path)
    return path


WRITERS = {
    "plain": lambda folder, state: _write_pth(folder / "w.pth", state),
    "state_dict": lambda folder, state: _write_pth(folder / "w.pth", {"state_dict": state, "epoch": 3}),
    "model": lambda folder, state: _write_pth(folder / "w.pt", {"model": state}),
    "DataParallel": lambda folder, state: _write_pth(folder / "w.pth", {f"module.{k}": v for k, v in state.items()}),
    "before num_batches_tracked": lambda folder, state: _write_pth(folder / "w.pth", {k: v for k, v in state.items() if "num_batches" not in k}),
}


@pytest.mark.parametrize("form", WRITERS)
def test_a_pth_file_is_loaded_in_the_forms_training_scripts_write(form: str, tmp_path: Path) -> None:
    source = network()
    nn.init.normal_(source.body.fc.weight)
    loaded = network(weights=WRITERS[form](tmp_path, source.body.state_dict()))
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_safetensors_and_our_own_checkpoints_are_weights_too(tmp_path: Path) -> None:
    source = network()
    nn.init.normal_(source.body.fc.weight)
    save_file(source.body.state_dict(), tmp_path / "foreign.safetensors")
    checkpoint.save(tmp_path, source)
    for name in ("foreign.safetensors", checkpoint.WEIGHTS):
        assert torch.equal(network(weights=tmp_path / name).body.fc.weight, source.body.fc.weight)


def test_a_head_of_another_width_starts_untrained_and_is_logged(tmp_path: Path) -> None:
    source, log = network(outputs=7), Log()
    nn.init.normal_(source.body.conv1.weight)
    path = _write_pth(tmp_path / "w.pth", source.body.state_dict())
    torch.manual_seed(0)
    made = models.build({"arch": "resnet20", "outputs": 5}, PREPROCESSING, str(path), log)
    assert torch.equal(made.body.conv1.weight, source.body.conv1.weight)
    assert torch.equal(made.body.fc.weight, network().body.fc.weight)
    assert len(log.messages) == 1
    assert "7 outputs, 5 are wanted" in log.messages[0]


def test_weights_of_another_architecture_are_refused_with_their_keys(tmp_path: Path) -> None:
    path = _write_pth(tmp_path / "w.pth", network("resnet32").body.state_dict())
    with pytest.raises(ArtifactMismatch, match=r"unexpected: layer1\.3\.bn1\.bias.* and \d+ more"):
        network(weights=path)
    narrow = network().body.state_dict() | {"conv1.weight": torch.zeros(16, 1, 3, 3)}
    with pytest.raises(ArtifactMismatch, match=r"misshaped: conv1\.weight \(wanted \[16, 3, 3, 3\], found \[16, 1, 3, 3\]\)"):
        network(weights=_write_pth(tmp_path / "n.pth", narrow))


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataNotFound, match="does not exist"):
        network(weights=tmp_path / "absent.pth")
    torch.save(network().body, tmp_path / "pickled.pth")
    with pytest.raises(ArtifactError, match="does not load as plain tensors"):
        network(weights=tmp_path / "pickled.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ArtifactError, match="no state dict of tensors"):
        network(weights=tmp_path / "list.pth")
    for name in ("noise.pth", "noise.safetensors"):
        (tmp_path / name).write_bytes(b"not a weights file at all")
        with pytest.raises(ArtifactError, match=name):
            network(weights=tmp_path / name)


def test_imagenet_weights_need_an_imagenet_network() -> None:
    for base in ({"arch": "resnet20"}, {"arch": "resnet18", "stem": "small"}):
        with pytest.raises(UsageError, match="ImageNet weights exist for"):
            models.build({"outputs": 5, **base}, PREPROCESSING, "imagenet")


@pytest.mark.parametrize("arch", TORCHVISION_ARCHITECTURES[:1])
def test_imagenet_weights_that_cannot_be_downloaded_are_an_error_with_a_remedy(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for variable in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens at the discard port
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(DataNotFound, match=r"(?s)resnet18 could not be downloaded.*model\.weights"):
        models.build({"arch": arch, "outputs": 5}, PREPROCESSING, "imagenet")
