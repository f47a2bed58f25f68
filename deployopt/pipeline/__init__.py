"""Recipe → plan → run. `plan` binds every stage's config, checks the order and says what is cached and why; `execute` is the one loop."""

from deployopt.pipeline.binding import available, schema, validate
from deployopt.pipeline.inspection import EXTRAS, diagnose, evaluate
from deployopt.pipeline.planning import Plan, Step, plan
from deployopt.pipeline.running import Observer, SilentObserver, execute

__all__ = ["EXTRAS", "Observer", "Plan", "SilentObserver", "Step", "available", "diagnose", "evaluate", "execute", "plan", "schema", "validate"]
