"""Makes the helpers of tests/runtime importable, here and in workers' children, which take over this process's sys.path."""

import sys
from pathlib import Path

HELPERS = str(Path(__file__).parents[1] / "runtime")
if HELPERS not in sys.path:
    sys.path.append(HELPERS)
