"""The one exception tree. Each leaf knows the process exit code it ends in.

DeployoptError                  4   anything of ours
├── UsageError                  2   a command line that cannot be meant
│   ├── RecipeError             2   a recipe: every problem at once, with positions
│   ├── OptionRefused           2   an option of a stage that what other stages make does not allow
│   └── RunLocked               2   another process works in this run folder
├── LackingEnvironment           3   something this machine lacks
│   ├── MissingDependency       3   a package; names the extra that brings it
│   ├── DataNotFound            3   files of a data set
│   ├── BackendUnavailable      3   a runtime that cannot work here, and why
│   └── DeviceUnavailable       3   a CUDA device that is not there
├── StageFailed                 4   a stage ended without its result
│   ├── TrainingDiverged        4
│   ├── PruningImpossible       4
│   ├── ExportFailed            4
│   ├── BuildFailed             4
│   ├── ProviderFallback        4   a runtime that would compute elsewhere than it was asked to
│   └── WorkerDied              4   the process of a session crashed, was killed or hung
└── ArtifactError               4   a file that is not what it should be
    ├── ArtifactCorrupt         4   bytes differ from the recorded sha256
    └── ArtifactMismatch        4   made for another version, device or input
"""

from typing import NamedTuple, Optional, Sequence


class DeployoptError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what was wanted, what was found and what is available.
        remedy: the command or recipe key that mends it.
    """

    exit_code = 4

    def __init__(self, message: str, remedy: Optional[str] = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return self.message if self.remedy is None else f"{self.message}\n  → {self.remedy}"


class UsageError(DeployoptError):
    """A command line or call that cannot be meant."""

    exit_code = 2


class Problem(NamedTuple):
    """One fault of a recipe. Lines and columns count from 1; 0 means the whole file."""

    source: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        where = f"{self.source}:{self.line}:{self.column}" if self.line else self.source
        return f"{where}: {self.message}"


class RecipeError(UsageError):
    """A recipe that cannot be run; holds every problem found, in file order."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda p: (p.source, p.line, p.column)))
        super().__init__("\n".join(str(p) for p in self.problems))


class OptionRefused(UsageError):
    """An option of a stage that does not go with what the stages before it make.

    Args:
        option: its key in the stage's options, as "precisions"; the planner turns it into a position in the recipe.
    """

    def __init__(self, option: str, message: str, remedy: Optional[str] = None) -> None:
        super().__init__(message, remedy)
        self.option = option


class RunLocked(UsageError):
    """Another process works in this run folder."""


class LackingEnvironment(DeployoptError):
    """Something this machine lacks."""

    exit_code = 3


class MissingDependency(LackingEnvironment):
    """A package that is not installed.

    Args:
        package: the import name wanted.
        extra: the extra of deployopt that brings it.
        purpose: what needed it, as "to train".
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"the package '{package}' is needed {purpose} and is not installed", f"pip install 'deployopt[{extra}]'")
        self.package = package
        self.extra = extra


class DataNotFound(LackingEnvironment):
    """Files of a data set are not where they were looked for."""


class BackendUnavailable(LackingEnvironment):
    """A runtime that cannot work on this machine; the message says why."""


class DeviceUnavailable(LackingEnvironment):
    """A device that was asked for by name and is not there."""


class StageFailed(DeployoptError):
    """A stage ended without its result."""


class TrainingDiverged(StageFailed):
    """The loss became NaN or infinite."""


class PruningImpossible(StageFailed):
    """No candidate meets the pruning target; the message says the best reached."""


class ExportFailed(StageFailed):
    """The model could not be written as ONNX, or the ONNX disagrees with its torch parent."""


class BuildFailed(StageFailed):
    """A backend could not build an artifact."""


class ProviderFallback(StageFailed):
    """A runtime that would compute elsewhere than it was asked to, as on the CPU; the message says what would."""


class WorkerDied(StageFailed):
    """The child process that held a session crashed, was killed or did not answer; the message names the signal."""


class ArtifactError(DeployoptError):
    """A file that is not what it should be."""


class ArtifactCorrupt(ArtifactError):
    """Bytes on disk differ from the recorded sha256."""


class ArtifactMismatch(ArtifactError):
    """An artifact made for another version, device or input than asked for."""
