"""One file a task: what the head's outputs mean and how they are scored. NumPy only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Task(Protocol):
    """The attributes of a task module.

    Attributes:
        primary: name of the headline metric ("top1", "mae").
        higher_is_better: direction of `primary`.
        unit: "" for a fraction, shown as percent; else the unit's name.
        loss: name of the training loss, as `nn.losses` knows it.
    """

    primary: str
    higher_is_better: bool
    unit: str
    loss: Literal["cross_entropy", "smooth_l1"]

    def head_width(self, targets: NDArray[Any], classes: tuple[str, ...]) -> int:
        """Outputs the head needs."""

    def score(self, outputs: NDArray[Any], targets: NDArray[Any]) -> dict[str, float | int]:
        """Metrics by name, with "n". `outputs` float32 [N, K]. Raises ValueError for non-finite outputs."""

    def agree(self, outputs: NDArray[Any], reference: NDArray[Any]) -> dict[str, float]:
        """ "agreement" in 0–1 with another model's outputs on the same images, and "max_abs_diff"."""

    def details(self, outputs: NDArray[Any], targets: NDArray[Any], classes: tuple[str, ...]) -> dict[str, Any]:
        """What a report may plot: for classification {"confusion": [[int]], "classes": [...]}."""
