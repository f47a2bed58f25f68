"""Networks by name: torchvision's ResNets, the CIFAR ResNets, and third parties' through the entry point `deployopt.models`."""

from __future__ import annotations

import http.client
import inspect
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deployopt import plugins
from deployopt.errors import ArtifactError, ArtifactMismatch, DataNotFound, UsageError
from deployopt.nn import (
    ARCHITECTURES,
    CIFAR_ARCHITECTURES,
    IMAGENET,
    STEMS,
    TORCHVISION_ARCHITECTURES,
    check_stem,
    check_weights,
    missing_weights,
    parametrizations,
    stem_of,
)
from deployopt.report import units
from deployopt.runtime.preprocessing import Preprocessing
from deployopt.runtime.progress import Progress, SilentProgress

NAMED = 6  # tensors in an error, of one kind


class Normalize(nn.Module):
    """(x − mean) / std per channel of [N, C, H, W]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        # not persistent: `preprocessing` says them, and two places could disagree
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Network(nn.Module):
    """A body behind its normalisation: float32 [N, C, H, W] in 0–1 → [N, outputs]. A body that returns anything else raises UsageError when it runs.

    Attributes:
        base: what `build` made the body from (JSON): {"arch", "stem", "outputs", "options"}.
        preprocessing: of the images it is fed; its mean and std are in `normalize`.
        lineage: transforms applied since, in order (JSON); see `nn.checkpoint`.
    """

    def __init__(self, body: nn.Module, base: Mapping[str, Any], preprocessing: Preprocessing) -> None:
        super().__init__()
        self.normalize = Normalize(preprocessing.mean, preprocessing.std)
        self.body = body
        self.base = dict(base)
        self.preprocessing = preprocessing
        self.lineage: list[dict[str, Any]] = []

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.body(self.normalize(x))
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            raise UsageError(
                f"{self.base['arch']} must return one tensor [N, {self.base['outputs']}]; in {'training' if self.training else 'evaluation'} mode "
                f"it returned a {_described(outputs)}",
                "return the logits alone from forward, flattened to one row an image; switch auxiliary heads off, as by model.options",
            )
        return outputs

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of one image."""
        return self.preprocessing.channels, self.preprocessing.image_size, self.preprocessing.image_size


def build(base: Mapping[str, Any], preprocessing: Preprocessing, weights: str | None = None, progress: Progress | None = None) -> Network:
    """A network by its description.

    Args:
        base: {"arch", "outputs"} and optionally "stem" ("imagenet": 7×7/2 and max pooling; "small": 3×3/2; "cifar": 3×3/1) and
            "options", keyword arguments of the architecture.
        weights: None (random, from torch's global generator), "imagenet" (torchvision's, downloaded) or a path to .safetensors or .pth.
            A head of another width is replaced by a random one, and that is logged.

    Raises:
        UsageError: unknown architecture or stem, or options that exclude each other.
        DataNotFound: no such weights file.
        ArtifactMismatch: weights of another architecture (lists the keys).
    """
    arch, outputs, options = base["arch"], int(base["outputs"]), dict(base.get("options") or {})
    stem = stem_of(arch, base.get("stem"))
    described = {"arch": arch, "stem": stem, "outputs": outputs, "options": options}
    if weights is not None:
        check_weights(weights, arch, stem, preprocessing.channels)
    network = Network(_body(arch, stem, outputs, preprocessing, options), described, preprocessing)
    if weights is not None:
        state = _imagenet(arch, progress or SilentProgress()) if weights == IMAGENET else _read(Path(weights))
        load_body(network.body, state, weights, progress or SilentProgress())
    return network


def _body(arch: str, stem: str, outputs: int, preprocessing: Preprocessing, options: dict[str, Any]) -> nn.Module:
    channels = preprocessing.channels
    if stem not in STEMS:
        raise UsageError(plugins.unknown("stem", stem, STEMS))
    try:
        if arch in TORCHVISION_ARCHITECTURES:
            return _torchvision(arch, stem, outputs, channels, options)
        if arch in CIFAR_ARCHITECTURES:
            check_stem(arch, stem)
            from deployopt.nn.cifar_resnet import CifarResNet

            return CifarResNet(int(arch.removeprefix("resnet")), outputs, channels, **options)
        if arch not in plugins.names("models"):
            raise UsageError(plugins.unknown("model", arch, [*ARCHITECTURES, *plugins.names("models")]))
        factory = plugins.find("models", arch)
        module: nn.Module = factory(num_outputs=outputs, **_data_arguments(factory, preprocessing, options), **options)
        parametrizations.check_hooks(module, arch)
        return module
    except TypeError as exc:
        raise UsageError(f"{arch} does not take these model.options: {sorted(options)} ({exc})", "correct model.options") from exc


def _data_arguments(factory: Callable[..., nn.Module], preprocessing: Preprocessing, options: Mapping[str, Any]) -> dict[str, int]:
    """What a third party's factory asks of the data, by naming its parameters `channels` and `image_size`.

    Raises:
        UsageError: the recipe's options say otherwise.
    """
    known = {"channels": preprocessing.channels, "image_size": preprocessing.image_size}
    asked = {name: value for name, value in known.items() if name in inspect.signature(factory).parameters}
    for name, value in asked.items():
        if options.get(name, value) != value:
            raise UsageError(f"model.options.{name} is {options[name]}, and the data have {value}", f"remove model.options.{name}")
    return {name: value for name, value in asked.items() if name not in options}


def _torchvision(arch: str, stem: str, outputs: int, channels: int, options: dict[str, Any]) -> nn.Module:
    import torchvision

    body: nn.Module = torchvision.models.get_model(arch, weights=None, num_classes=outputs, **options)
    if stem != "imagenet":
        body.conv1 = nn.Conv2d(channels, 64, 3, stride=2 if stem == "small" else 1, padding=1, bias=False)
        body.maxpool = nn.Identity()
    elif channels != 3:
        body.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    if stem != "imagenet" or channels != 3:
        nn.init.kaiming_normal_(body.conv1.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type, union-attr]
    body.avgpool = nn.AdaptiveAvgPool2d(1)  # exported as GlobalAveragePool; (1, 1) is not, by every exporter
    return body


def _imagenet(arch: str, progress: Progress) -> dict[str, Tensor]:
    import torchvision

    try:
        with progress.track(f"fetch torchvision's weights of {arch}", None):
            state: dict[str, Tensor] = torchvision.models.get_model_weights(arch).DEFAULT.get_state_dict(progress=False, check_hash=True)
    except (OSError, http.client.HTTPException, RuntimeError) as exc:  # RuntimeError: other bytes than published
        raise DataNotFound(f"ImageNet weights of {arch} could not be downloaded: {exc}", "set model.weights to a local .pth or .safetensors file") from exc
    return state


def _read(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a .pth that holds tensors only."""
    if not path.is_file():
        raise missing_weights(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state: dict[str, Tensor] = load_file(path)
        except SafetensorError as exc:
            raise ArtifactError(f"{path} is not a safetensors file: {exc}") from exc
        return state
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as exc:
        first_line = str(exc).strip().partition("\n")[0]
        raise ArtifactError(f"{path} does not load as plain tensors: {first_line}", "save model.state_dict() with torch.save or as .safetensors") from exc
    for key in ("state_dict", "model"):  # how training scripts commonly wrap it
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ArtifactError(f"{path} holds no state dict of tensors", "save model.state_dict() with torch.save or as .safetensors")
    return loaded


def load_body(body: nn.Module, state: dict[str, Tensor], source: str, progress: Progress) -> None:
    """Load strictly, but for a head of another width: the last linear layer then stays as initialised."""
    found = {key.removeprefix("module.").removeprefix("body."): value for key, value in state.items()}
    wanted = body.state_dict()
    counters = {key: value for key, value in wanted.items() if key.endswith(".num_batches_tracked")}
    found = counters | found  # files older than PyTorch 0.4.1 have none
    head = [name for name, module in body.named_modules() if isinstance(module, nn.Linear)][-1:]
    misshaped = {key for key in found.keys() & wanted.keys() if found[key].shape != wanted[key].shape}
    head_keys = {f"{name}.{part}" for name in head for part in ("weight", "bias")}
    if misshaped and misshaped <= head_keys and all(found[key].shape[1:] == wanted[key].shape[1:] for key in misshaped):
        width = {int(found[key].shape[0]) for key in misshaped}.pop()
        progress.log(f"{source}: its head has {width} outputs, {wanted[min(misshaped)].shape[0]} are wanted: the head starts untrained")
        found |= {key: wanted[key] for key in head_keys & wanted.keys()}
        misshaped = set()
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unexpected or misshaped:
        shapes = [f"{key} (wanted {list(wanted[key].shape)}, found {list(found[key].shape)})" for key in sorted(misshaped)]
        lists = [f"{title}: {units.listed(keys, NAMED)}" for title, keys in (("missing", missing), ("unexpected", unexpected), ("misshaped", shapes)) if keys]
        raise ArtifactMismatch(f"{source} does not fit this architecture; {'; '.join(lists)}", "correct model.arch, model.stem or model.weights")
    body.load_state_dict(found)


def _described(found: object) -> str:
    """What a network returned, in words: "dict of logits (Tensor [2, 10]), aux (Tensor [2, 10])"."""
    if isinstance(found, Tensor):
        return f"Tensor [{', '.join(str(size) if isinstance(size, int) else 'N' for size in found.shape)}]"  # of any batch size while it is traced
    kind = type(found).__name__
    parts = found if isinstance(found, Mapping) else found._asdict() if hasattr(found, "_asdict") else None
    if parts is not None:
        return f"{kind} of {', '.join(f'{name} ({_described(part)})' for name, part in parts.items())}"
    return f"{kind} of {', '.join(map(_described, found))}" if isinstance(found, (tuple, list)) else kind
