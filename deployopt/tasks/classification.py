"""Single-label classification: outputs are logits [N, classes]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from deployopt.errors import UsageError
from deployopt.tasks._checks import checked

if TYPE_CHECKING:
    from numpy.typing import NDArray

primary = "top1"
higher_is_better = True
unit = ""
loss: Literal["cross_entropy", "smooth_l1"] = "cross_entropy"


def head_width(targets: NDArray[Any], classes: tuple[str, ...]) -> int:
    """One output a class.

    Raises:
        UsageError: the data set has no classes, or targets that are not class indices.
    """
    import numpy as np

    if not classes or targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer):
        raise UsageError(f"classification wants class indices; the data set has {len(classes)} classes and {targets.dtype} targets", "task: regression")
    return len(classes)


def score(outputs: NDArray[Any], targets: NDArray[Any]) -> dict[str, float | int]:
    """top1, and top5 when there are more than five classes."""
    import numpy as np

    outputs = checked(outputs, len(targets))
    result: dict[str, float | int] = {"top1": float(np.mean(outputs.argmax(axis=1) == targets))}
    if outputs.shape[1] > 5:
        best = np.argsort(-outputs, axis=1, kind="stable")[:, :5]
        result["top5"] = float(np.mean((best == targets[:, None]).any(axis=1)))
    return {**result, "n": len(targets)}


def agree(outputs: NDArray[Any], reference: NDArray[Any]) -> dict[str, float]:
    """Share of images with the same most likely class, and the largest difference of any logit."""
    import numpy as np

    outputs, reference = checked(outputs, len(reference)), checked(reference, len(reference))
    return {
        "agreement": float(np.mean(outputs.argmax(axis=1) == reference.argmax(axis=1))),
        "max_abs_diff": float(np.abs(outputs.astype(np.float64) - reference).max()),
    }


def details(outputs: NDArray[Any], targets: NDArray[Any], classes: tuple[str, ...]) -> dict[str, Any]:
    """The confusion matrix: row = true class, column = predicted class."""
    import numpy as np

    predicted = checked(outputs, len(targets)).argmax(axis=1)
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (targets, predicted), 1)
    return {"confusion": confusion.tolist(), "classes": list(classes)}
