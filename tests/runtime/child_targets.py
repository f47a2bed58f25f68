"""Functions that test_child.py calls in a child."""

import os
import time
from pathlib import Path

from deployopt.errors import ArtifactMismatch


def double(*, value, progress):
    print("native noise on standard output")
    progress.log("working")
    with progress.track("doubling", 2) as bar:
        bar.advance(1, "half")
        bar.advance(1)
    return {"value": 2 * value}


def crash(*, number, progress):
    os.write(2, b"last words\n")
    os.kill(os.getpid(), number)
    time.sleep(5)


def mismatch(*, progress):
    raise ArtifactMismatch("wanted 1, found 2", "build it again")


def foreign(*, progress):
    raise LookupError("nothing there")


def exit_at_once(*, progress):
    os._exit(3)


def tell_and_sleep(*, pid_file, progress):
    Path(pid_file).write_text(str(os.getpid()))
    with progress.track("sleeping", 1) as bar:
        bar.advance(0)
        time.sleep(60)
