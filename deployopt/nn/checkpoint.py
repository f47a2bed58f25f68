"""A torch model on disk: `model.safetensors` and `model.json` (base, preprocessing, lineage). No pickles.

Loading = base network → replay of the lineage → weights, strictly. A lineage entry is {"op": "prune", "history": […]} (`nn.pruning`)
or {"op": "quantize", …} (`nn.quantizer`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from deployopt.artifact import Artifact
from deployopt.errors import ArtifactError, ArtifactMismatch
from deployopt.nn import models
from deployopt.nn.models import Network
from deployopt.runtime.files import atomic_write, atomic_write_json
from deployopt.runtime.preprocessing import Preprocessing
from deployopt.runtime.session import TensorSpec

SCHEMA = 1
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"


def specs(network: Network) -> tuple[TensorSpec, TensorSpec]:
    """(input, output) of a network, with the dynamic axis "batch"."""
    return TensorSpec("input", ("batch", *network.input_shape), "float32"), TensorSpec("output", ("batch", network.base["outputs"]), "float32")


def save(folder: Path, network: Network) -> Artifact:
    """Write both files into `folder` (created if need be); the description last, so that it vouches for the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    atomic_write(folder / WEIGHTS, to_safetensors(state))
    inputs, outputs = specs(network)
    description = {
        "schema": SCHEMA,
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
    description = _describe(folder / DESCRIPTION)
    with torch.random.fork_rng(devices=[]):  # the random start is overwritten; the caller's stream stays as it was
        network = models.build(description["base"], Preprocessing.from_json(description["preprocessing"]))
    for entry in description["lineage"]:
        _replay(network, entry)
    network.lineage = description["lineage"]
    try:
        network.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    except (SafetensorError, OSError) as exc:
        raise ArtifactError(f"{folder / WEIGHTS} cannot be read: {exc}", "deployopt run RECIPE --fresh rebuilds it") from exc
    except RuntimeError as exc:  # torch lists missing, unexpected and misshaped keys
        raise ArtifactMismatch(f"{folder / WEIGHTS} does not fit {DESCRIPTION}: {exc}") from exc
    return network.to(device).eval()


def _describe(path: Path) -> dict[str, Any]:
    try:
        description: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as exc:
        raise ArtifactError(f"{path} cannot be read: {exc}", "a torch model is a folder with model.safetensors and model.json") from exc
    if description.get("schema") != SCHEMA:
        raise ArtifactMismatch(f"{path} has schema {description.get('schema')}, this deployopt reads {SCHEMA}", "use the deployopt version that wrote it")
    return description


def _replay(network: Network, entry: dict[str, Any]) -> None:
    match entry["op"]:
        case "prune":
            from deployopt.nn import pruning

            pruning.replay(network, entry["history"])
        case "quantize":
            from deployopt.nn import quantizer

            quantizer.replay(network, entry)
        case other:
            raise ArtifactMismatch(f"the lineage holds '{other}', this deployopt replays prune and quantize", "use the deployopt version that wrote it")
