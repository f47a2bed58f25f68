"""Functions that tests call in a child."""

import os
import signal
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


def meet(*, rank, folder, progress):
    """Return once the other has come, too."""
    with progress.track(f"rank {rank}", 1) as bar:
        (Path(folder) / str(rank)).touch()
        while not (Path(folder) / str(1 - rank)).exists():
            time.sleep(0.01)
        bar.advance()
    return rank


def second_fails(*, rank, folder, how, progress):
    (Path(folder) / f"{rank}.pid").write_text(str(os.getpid()))
    while not all((Path(folder) / f"{r}.pid").exists() for r in (0, 1)):
        time.sleep(0.01)
    if rank == 1 and how == "mismatch":
        mismatch(progress=progress)
    if rank == 1:
        crash(number=signal.SIGSEGV, progress=progress)
    time.sleep(60)


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


def load_no_engine(*, progress):
    """In a child, for the vendor's runtime was once seen to hang as it started on a machine without a driver."""
    import tensorrt_rtx

    from deployopt.runtime import tensorrt, tensorrt_vendor

    tensorrt.load_engine(tensorrt_rtx, b"junk" * 100, tensorrt_vendor.make_logger(tensorrt_rtx))
