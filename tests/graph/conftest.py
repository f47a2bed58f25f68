"""Makes the helpers of tests/runtime importable."""

import sys
from pathlib import Path

HELPERS = str(Path(__file__).parents[1] / "runtime")
if HELPERS not in sys.path:
    sys.path.append(HELPERS)
