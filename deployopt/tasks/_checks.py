"""What both tasks ask of a model's outputs before they score them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


def checked(outputs: NDArray[Any], n: int) -> NDArray[Any]:
    """`outputs`, if they are finite [n, K] with n > 0.

    Raises:
        ValueError: another shape, no image at all, or NaN or infinities (says how many images have them).
    """
    import numpy as np

    if outputs.ndim != 2 or len(outputs) != n or n == 0:
        raise ValueError(f"wanted outputs [{n}, K] with at least one image, found {list(outputs.shape)}")
    finite = np.isfinite(outputs).all(axis=1)
    if not finite.all():
        raise ValueError(f"{int((~finite).sum())} of {n} images have NaN or infinite outputs")
    return outputs
