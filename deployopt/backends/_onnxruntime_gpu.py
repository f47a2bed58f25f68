"""What the backends of ONNX Runtime's GPU providers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deployopt.artifact import Availability
from deployopt.backends import _shared
from deployopt.errors import LackingEnvironment
from deployopt.runtime.cuda import find_gpus, names_of
from deployopt.runtime.onnxruntime_gpu import require
from deployopt.runtime.onnxruntime_session import load_vendor


def probe(provider: str, offered: Mapping[str, str | None]) -> Availability:
    """Whether the provider and what it needs are here.

    Args:
        offered: precision → None, or why it is not executed.
    """

    def describe(ort: Any) -> Availability:
        try:
            require(provider)
        except LackingEnvironment as exc:
            return Availability(False, False, ort.__version__, None, exc.message, offered, exc.remedy)
        return Availability(True, True, ort.__version__, names_of(find_gpus()), None, offered)

    return _shared.probe(load_vendor, describe)
