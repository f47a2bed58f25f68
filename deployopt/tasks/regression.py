"""Regression of K real values an image: outputs and targets float32 [N, K]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from deployopt.errors import UsageError
from deployopt.tasks._checks import checked

if TYPE_CHECKING:
    from numpy.typing import NDArray

primary = "mae"
higher_is_better = False
unit = "target units"
loss: Literal["cross_entropy", "smooth_l1"] = "smooth_l1"
AGREEMENT_TOLERANCE = 0.05  # of the reference outputs' standard deviation, per output


def head_width(targets: NDArray[Any], classes: tuple[str, ...]) -> int:
    """One output a target value.

    Raises:
        UsageError: targets are not real vectors.
    """
    import numpy as np

    if targets.ndim != 2 or not np.issubdtype(targets.dtype, np.floating):
        raise UsageError(f"regression wants float targets [N, K], the data set has {targets.dtype} {list(targets.shape)}", "task: classification")
    return int(targets.shape[1])


def score(outputs: NDArray[Any], targets: NDArray[Any]) -> dict[str, float | int]:
    """Mean absolute error, root mean squared error, and R² averaged over the outputs (1 is perfect, 0 is predicting the mean)."""
    import numpy as np

    error = checked(outputs, len(targets)).astype(np.float64) - targets
    residual, total = (error**2).sum(axis=0), ((targets - targets.mean(axis=0, dtype=np.float64)) ** 2).sum(axis=0)
    # a constant target has no variance to explain: 1 if it is met exactly, else 0 (as scikit-learn's r2_score)
    r2 = np.where(total > 0, 1 - residual / np.where(total > 0, total, 1), np.where(residual > 0, 0.0, 1.0))
    return {"mae": float(np.abs(error).mean()), "rmse": float(np.sqrt((error**2).mean())), "r2": float(r2.mean()), "n": len(targets)}


def agree(outputs: NDArray[Any], reference: NDArray[Any]) -> dict[str, float]:
    """Share of images whose every output lies within 5 % of the reference outputs' standard deviation, and the largest difference."""
    import numpy as np

    difference = np.abs(checked(outputs, len(reference)).astype(np.float64) - checked(reference, len(reference)))
    within = difference <= AGREEMENT_TOLERANCE * reference.std(axis=0, dtype=np.float64)
    return {"agreement": float(within.all(axis=1).mean()), "max_abs_diff": float(difference.max())}


def details(outputs: NDArray[Any], targets: NDArray[Any], classes: tuple[str, ...]) -> dict[str, Any]:
    """Quantiles (5, 25, 50, 75, 95 %) of the signed error, per output."""
    import numpy as np

    error = checked(outputs, len(targets)).astype(np.float64) - targets
    levels = [0.05, 0.25, 0.5, 0.75, 0.95]
    return {"error_quantiles": {"levels": levels, "values": np.quantile(error, levels, axis=0).T.tolist()}}
