"""Which multiple of channels to keep: chosen by timing what is left, not by counting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from deployopt.stages import StageContext

if TYPE_CHECKING:
    from deployopt.nn.models import Network

CANDIDATES = (1, 4, 8, 16)
SECONDS = 1.0  # timed for each candidate
IMAGES = 32


def fastest(context: StageContext, network: Network, cut: Callable[[Network, int], Any]) -> dict[str, Any]:
    """Cut copies of `network` with each candidate and time them as FP32 at batch 1 on ONNX Runtime, interleaved, with all processes' threads.

    Args:
        cut: prunes the network it is given, in place, keeping multiples of the given number of channels.

    Returns:
        {"round_to": the fastest, "p50_ms": {candidate: median}}; candidates that cannot reach the target are left out.

    Raises:
        PruningImpossible: none of them can.
        StageFailed: none could be timed.
    """
    from deployopt.bench.harness import Failure, Settings, Subject, measure
    from deployopt.errors import PruningImpossible, StageFailed
    from deployopt.runtime.session import SessionOptions

    impossible: PruningImpossible | None = None
    subjects = []
    with TemporaryDirectory() as folder:
        for candidate in CANDIDATES:
            trial = copy.deepcopy(network)
            try:
                cut(trial, candidate)
            except PruningImpossible as error:
                impossible = error
                continue
            with context.progress.track(f"export with multiples of {candidate}", None):
                path = _export(trial, Path(folder) / f"{candidate}.onnx")
            subjects.append(Subject(str(candidate), "deployopt.backends.onnxruntime:open", path, SessionOptions(context.threads * context.processes)))
        if not subjects and impossible is not None:
            raise impossible
        test = context.dataset().validation
        results = measure(subjects, test.images(range(min(IMAGES, len(test)))), Settings(min_seconds=SECONDS), context.progress, source="validation split")
    timed = {key: result.host["p50"] for key, result in results.items() if not isinstance(result, Failure)}
    if not timed:
        reasons = "; ".join(f"{key}: {result.reason}" for key, result in results.items() if isinstance(result, Failure))
        raise StageFailed(f"no candidate of prune.round_to could be timed: {reasons}", "set prune.round_to to a number")
    return {"round_to": int(min(timed, key=lambda key: timed[key])), "p50_ms": timed}


def _export(network: Network, path: Path) -> Path:
    import onnx

    from deployopt.graph.canonical import canonicalize
    from deployopt.nn.capture import example_input
    from deployopt.nn.export import deployed, to_onnx

    example = example_input(network.preprocessing)
    onnx.save(canonicalize(to_onnx(deployed(network), example, opset=21)), str(path))
    return path
