"""Recipe → plan → run. `plan` binds every stage's config, checks the order and says what is cached and why; `execute` is the one loop.

What is named here is imported on first use: `validate` answers without loading what a run needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deployopt.pipeline.binding import available, schema, validate
    from deployopt.pipeline.inspection import EXTRAS, diagnose, evaluate, timing_images
    from deployopt.pipeline.planning import Plan, Step, choose_device, plan
    from deployopt.pipeline.running import Observer, SilentObserver, execute

__all__ = [
    "EXTRAS",
    "Observer",
    "Plan",
    "SilentObserver",
    "Step",
    "available",
    "choose_device",
    "diagnose",
    "evaluate",
    "execute",
    "plan",
    "schema",
    "timing_images",
    "validate",
]

_HOMES = {
    "binding": ("available", "schema", "validate"),
    "inspection": ("EXTRAS", "diagnose", "evaluate", "timing_images"),
    "planning": ("Plan", "Step", "choose_device", "plan"),
    "running": ("Observer", "SilentObserver", "execute"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"deployopt.pipeline.{module}"), name)
    raise AttributeError(f"module 'deployopt.pipeline' has no attribute '{name}'")
