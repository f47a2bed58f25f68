"""Are outputs those of the reference but for rounding? An ONNX file is held to its torch parent, an engine to its ONNX file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from deployopt.artifact import Precision
from deployopt.data import ImageSet, Leading

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from deployopt.bench.accuracy import Infer
    from deployopt.tasks import Task

PARITY_IMAGES = 128
SMALLEST_IMAGES = 16  # of them, in an engine's smallest batch size too
BATCHES = (1, 2, 7, 64)  # the rest in one batch
WIDENED: dict[Precision, str] = {
    "bf16": "ONNX Runtime has no BF16 convolution on CPUs and ran the file widened to FP32: with weights as BF16 rounds them, and activations not rounded"
}


@dataclass(frozen=True)
class Limit:
    """How far outputs may be from their reference. Rounding stays inside; a wrong graph lies far outside.

    Attributes:
        relative: largest difference of any output, as a share of the largest reference output (at least of 1).
        agreement: least share of images with the same prediction; of 128 images 0.98 lets two change that were undecided.
    """

    relative: float
    agreement: float


def limit_of(precision: Precision, layers: int) -> Limit:
    """What rounding alone may do in a network of so many convolutions and matrix products.

    - fp32: sums of K products in another order differ by √K · 2⁻²⁴ (Higham and Mary, https://doi.org/10.1137/18M1226312), K ≤ 4608 in ResNets (512 · 3 · 3);
      a folded BatchNorm differs by 16 roundings at most: 4 of γ/√(σ² + ε) and of a weight by it, 6 of the bias, 6 of BatchNorm itself. Layers add up.
      Seen on trained ResNets: 10⁻⁶.
    - fp16: weights, results and sums are rounded to 11 bits, independently, so three roundings of 2⁻¹¹ a layer add up as their squares; twice that,
      as it is the largest of many outputs. Seen: 3 · 10⁻⁴ to 8 · 10⁻⁴.
    - bf16: 8 bits, two roundings a layer. Of an export, compared with torch, only the weights are rounded, as it runs widened to FP32 (`WIDENED`); of an
      engine, compared with that file, only results and sums, as both have the same weights. More images than in FP16 are near a tie. Seen on trained
      ResNet-18s: 3 · 10⁻⁴ to 0.004 for exports, 0.006 to 0.012 for torch's BF16 in an engine's place.
    - int8: the same integers, but a value on the other side of a rounding tie is one step, 1/127 of its range; one such step a layer. Seen: 0.003 to 0.012.
    - int8_fp16: in 11 bits, values near a tie are many; two steps a layer.
    """
    if precision == "fp32":
        return Limit(layers * (4608**0.5 + 16) * 2**-24, 0.99)
    if precision == "fp16":
        return Limit(2 * (3 * layers) ** 0.5 * 2**-11, 0.98)
    if precision == "bf16":
        return Limit(2 * (2 * layers) ** 0.5 * 2**-8, 0.95)
    steps = 1 if precision == "int8" else 2
    return Limit(steps * layers**0.5 / 127, 0.98 if precision == "int8" else 0.95)


def compare(outputs: NDArray[np.float32], reference: NDArray[np.float32], limit: Limit, task: Task) -> tuple[dict[str, float], str | None]:
    """How far outputs [N, K] are from a reference's, with the limits, and what exceeds them; None if nothing does."""
    import numpy as np

    undefined = int((~np.isfinite(outputs)).any(axis=1).sum())
    if undefined:
        return {}, f"outputs of {undefined} of {len(outputs)} images are NaN or infinite"
    found = task.agree(outputs, reference)
    largest = limit.relative * max(1.0, float(abs(reference).max()))
    figures = {**found, "max_abs_diff_limit": largest, "agreement_limit": limit.agreement}
    if found["max_abs_diff"] <= largest and found["agreement"] >= limit.agreement:
        return figures, None
    return figures, (f"largest difference {found['max_abs_diff']:.3g} (limit {largest:.3g}), agreement {found['agreement']:.3f} (limit {limit.agreement})")


def outputs_by_batch(infer: Infer, images: ImageSet, batch_sizes: Sequence[int]) -> dict[int, NDArray[np.float32]]:
    """An engine's outputs [N, K] in batches of the largest size, and of the smallest, for which it may run other kernels.

    Of the smallest only the first images, which cost little; the others' are those of the largest, so that limits for N images hold for both.
    """
    import numpy as np

    from deployopt.bench.accuracy import outputs_of

    smallest, largest = min(batch_sizes), max(batch_sizes)
    outputs = {largest: outputs_of(infer, images, largest)}
    if smallest < largest:
        first = outputs_of(infer, Leading(images, max(SMALLEST_IMAGES, smallest)), smallest)
        outputs[smallest] = np.concatenate([first, outputs[largest][len(first) :]])
    return outputs


def onnx_outputs(path: Path, precision: Precision, images: ImageSet, threads: int) -> NDArray[np.float32]:
    """Outputs of an ONNX file, run as it is written, in batches of all of `BATCHES`: a batch axis that is not dynamic fails here.

    Those of `WIDENED` run with FP32 in place of a type that ONNX Runtime lacks.

    Returns:
        float32 [M, K]: of the N images, and of the first ones again where N is less than the batches' sum, M.

    Raises:
        BackendUnavailable, ArtifactMismatch: ONNX Runtime is not installed, or cannot run it.
    """
    import numpy as np

    from deployopt.runtime.onnxruntime_session import open_unoptimized
    from deployopt.runtime.preprocessing import to_feed

    ends = [sum(BATCHES[:i]) for i in range(len(BATCHES) + 1)]
    bounds = sorted({*ends, max(ends[-1], len(images))})
    with TemporaryDirectory() as scratch, open_unoptimized(_runnable(path, precision, Path(scratch)), threads) as session:
        name = session.inputs[0].name
        parts = [next(iter(session.infer({name: to_feed(images.images([i % len(images) for i in range(a, b)]))}).values())) for a, b in pairwise(bounds)]
    return np.concatenate(parts)


def _runnable(path: Path, precision: Precision, folder: Path) -> Path:
    """The file, or of a precision that ONNX Runtime lacks its widened form, written into `folder` under the same name."""
    if precision not in WIDENED:
        return path
    import onnx

    from deployopt.graph.casts import widen

    widened = folder / path.name
    onnx.save(widen(onnx.load(str(path))), str(widened))
    return widened
