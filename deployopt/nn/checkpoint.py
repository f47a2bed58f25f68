"""A torch model on disk: `model.safetensors` and `model.json` (base, preprocessing, lineage). No pickles.

Loading = base network → replay of the lineage → weights, strictly. A lineage entry is {"op": "prune", "history": […]} (`nn.pruning`),
{"op": "quantize", …} (`nn.quantizer`) or {"op": "remove_parametrizations", "modules": […]} (`nn.parametrizations`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from deployopt.artifact import DESCRIPTION, DESCRIPTION_SCHEMA, WEIGHTS, Artifact, read_description
from deployopt.errors import ArtifactError, ArtifactMismatch
from deployopt.nn import models
from deployopt.nn.models import Network
from deployopt.runtime.files import atomic_write, atomic_write_json
from deployopt.runtime.preprocessing import Preprocessing
from deployopt.runtime.progress import Progress
from deployopt.runtime.session import TensorSpec


def specs(network: Network) -> tuple[TensorSpec, TensorSpec]:
    """(input, output) of a network, with the dynamic axis "batch"."""
    return TensorSpec("input", ("batch", *network.input_shape), "float32"), TensorSpec("output", ("batch", network.base["outputs"]), "float32")


def save(folder: Path, network: Network) -> Artifact:
    """Write both files into `folder` (created if need be); the description last, so that it vouches for the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in network.state_dict().items():  # safetensors takes no storage twice: a module with two names is written under both
        again = tensor.data_ptr() in seen
        seen.add(tensor.data_ptr())
        state[name] = (tensor.detach().clone() if again else tensor.detach()).cpu().contiguous()
    atomic_write(folder / WEIGHTS, to_safetensors(state))
    inputs, outputs = specs(network)
    description = {
        "schema": DESCRIPTION_SCHEMA,
        "base": network.base,
        "preprocessing": network.preprocessing.to_json(),
        "input": list(inputs),
        "output": list(outputs),
        "lineage": network.lineage,
    }
    atomic_write_json(folder / DESCRIPTION, description)
    return Artifact.of("torch", folder / WEIGHTS, inputs=(inputs,), outputs=(outputs,), metadata={"precision": "fp32"})


def load(folder: Path, device: str = "cpu") -> Network:
    """The network of `folder`, in evaluation mode.

    Raises:
        ArtifactError: a file is missing or unreadable.
        ArtifactMismatch: another schema, or weights that do not fit the description.
    """
    description = read_description(folder)
    with torch.random.fork_rng(devices=[]):  # the random start is overwritten; the caller's stream stays as it was
        network = _rebuild(description["base"], Preprocessing.from_json(description["preprocessing"]), description["lineage"])
    try:
        network.load_state_dict(_read_weights(folder), strict=True)
    except RuntimeError as exc:  # torch lists missing, unexpected and misshaped keys
        raise ArtifactMismatch(f"{folder / WEIGHTS} does not fit {DESCRIPTION}: {exc}") from exc
    return network.to(device).eval()


def resume(folder: Path, outputs: int, preprocessing: Preprocessing, progress: Progress) -> Network:
    """The network of an earlier run's folder, to go on from: its lineage kept, on images of the given preprocessing.

    A head of another width is replaced by a random one (from torch's global generator), and that is logged.

    Raises:
        ArtifactError: a file is missing or unreadable.
        ArtifactMismatch: weights that do not fit; or the network is quantised, and its scales belong to another preprocessing or head.
    """
    description = read_description(folder)
    base, trained_on = description["base"], Preprocessing.from_json(description["preprocessing"])
    quantized = any(entry["op"] == "quantize" for entry in description["lineage"])
    if quantized and (trained_on, int(base["outputs"])) != (preprocessing, outputs):
        raise ArtifactMismatch(
            f"{folder} is quantised for {base['outputs']} outputs and {trained_on}; the data have {outputs} and {preprocessing}",
            "set the data section as in the run that made it, or start from its float parent",
        )
    network = _rebuild({**base, "outputs": outputs}, preprocessing, description["lineage"])
    models.load_body(network.body, _read_weights(folder), str(folder), progress)
    return network


def _rebuild(base: Mapping[str, Any], preprocessing: Preprocessing, lineage: list[dict[str, Any]]) -> Network:
    """A network of random weights, cut and quantised as its lineage says."""
    network = models.build(base, preprocessing)
    for entry in lineage:
        _replay(network, entry)
    network.lineage = lineage
    return network


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    try:
        state: dict[str, torch.Tensor] = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as exc:
        raise ArtifactError(f"{folder / WEIGHTS} cannot be read: {exc}", "deployopt run RECIPE --fresh rebuilds it") from exc
    return state


def _replay(network: Network, entry: dict[str, Any]) -> None:
    match entry["op"]:
        case "prune":
            from deployopt.nn import pruning

            pruning.replay(network, entry["history"])
        case "quantize":
            from deployopt.nn import quantizer

            quantizer.replay(network, entry)
        case "remove_parametrizations":
            from deployopt.nn import parametrizations

            parametrizations.replay(network, entry["modules"])
        case other:
            known = "prune, quantize and remove_parametrizations"
            raise ArtifactMismatch(f"the lineage holds '{other}', this deployopt replays {known}", "use the deployopt version that wrote it")
