"""Are these the arrays that a session takes?"""

from typing import Sequence

from deployopt.errors import UsageError
from deployopt.runtime.session import Feed, TensorSpec


def check_feed(feed: Feed, inputs: Sequence[TensorSpec]) -> None:
    """Names, dtypes and shapes against a session's inputs; named axes take any size from 1.

    Raises:
        UsageError: the first input that is missing, unknown or does not fit.
    """
    if set(feed) != {spec.name for spec in inputs}:
        raise UsageError(f"inputs {sorted(feed)} were given; the model takes {[spec.name for spec in inputs]}")
    for name, shape, dtype in inputs:
        array = feed[name]
        fits = array.ndim == len(shape) and all(size >= 1 if isinstance(shape[i], str) else size == shape[i] for i, size in enumerate(array.shape))
        if not fits or array.dtype != dtype:
            raise UsageError(f"input '{name}' takes {dtype} {list(shape)}, found {array.dtype} {list(array.shape)}")


def check_feeds(feeds: Sequence[Feed], inputs: Sequence[TensorSpec]) -> None:
    """As `check_feed` for each, and that they are of one shape.

    Raises:
        UsageError: as `check_feed`, no feeds, or feeds of several shapes.
    """
    for feed in feeds:
        check_feed(feed, inputs)
    shapes = {tuple(feed[spec.name].shape for spec in inputs) for feed in feeds}
    if len(shapes) != 1:
        raise UsageError(f"feeds to be timed must be of one shape, and at least one; {len(feeds)} were given, of shapes {sorted(shapes)[:3]}")
