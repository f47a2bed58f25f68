"""Two processes train as one does: the same optimisation up to rounding, the same bits on both and in every repetition."""

import os
import time
from pathlib import Path
from typing import Any

import distributed_targets as targets
import pytest
import torch

from deployopt.errors import StageFailed, UsageError
from deployopt.nn import distributed
from deployopt.runtime.child import run_in_children
from deployopt.runtime.progress import SilentProgress

PROCESSES = 2


def in_processes(target: str, folder: Path, **arguments: Any) -> Any:
    folder.mkdir()
    calls = [{"rank": rank, "processes": PROCESSES, "folder": str(folder), **arguments} for rank in range(PROCESSES)]
    return run_in_children(f"distributed_targets:{target}", calls, SilentProgress(), "training in 2 processes")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Any]]:
    """What ranks agreed on, and what each left."""
    folder = tmp_path_factory.mktemp("together") / "first"
    agreed = in_processes("train", folder, qat=True)
    return agreed, [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_all_processes_end_with_the_same_finite_weights_and_history(together: tuple[Any, list[Any]]) -> None:
    _, (first, second) = together
    assert set(first["states"]) == {"plain", "moved", "qat"}
    for name, state in first["states"].items():
        assert same(state, second["states"][name]), name
        assert all(bool(torch.isfinite(value).all()) for value in state.values())
    assert first["records"] == second["records"]


@pytest.mark.parametrize(("name", "augment"), [("plain", {}), ("moved", {"resized_crop": 0.5, "horizontal_flip": True})])
def test_it_is_the_optimisation_of_one_process_up_to_rounding(together: tuple[Any, list[Any]], name: str, augment: dict[str, Any]) -> None:
    alone, records = targets.trained(augment)
    for key, value in together[1][0]["states"][name].items():
        torch.testing.assert_close(value, alone[key], rtol=1e-3, atol=1e-5)
    if name == "plain":
        for ours, theirs in zip(together[1][0]["records"], records, strict=True):
            assert list(ours.values())[1:] == pytest.approx(list(theirs.values())[1:], rel=1e-4)  # all but the phase's name


def test_a_repetition_gives_the_same_bits(together: tuple[Any, list[Any]], tmp_path: Path) -> None:
    in_processes("train", tmp_path / "again", qat=False)
    again = torch.load(tmp_path / "again" / "0.pt")["states"]
    assert all(same(state, together[1][0]["states"][name]) for name, state in again.items())


def test_outputs_are_whole_and_a_decision_is_rank_0s_alone(together: tuple[Any, list[Any]]) -> None:
    agreed, _ = together
    assert agreed["outputs"] == [23, 3]
    assert agreed["few"] == [1, 3]
    assert agreed["decided"] == [agreed["pid"], 1]


def test_a_batch_too_small_to_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)at least 4 images, 2 each for BatchNorm; found 3.*raise batch_size"):
        in_processes("too_small", tmp_path / "run")


def test_a_parameter_that_no_output_depends_on_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)2 processes .*does not depend on unused\.weight, unused\.bias\n.*--nproc 1"):
        in_processes("unreached", tmp_path / "run", frozen=False)
    in_processes("unreached", tmp_path / "frozen", frozen=True)


@pytest.mark.parametrize(("how", "said"), [("dies", "was ended by SIGKILL"), ("raises", "LookupError: nothing there")])
def test_one_that_fails_ends_all_with_its_reason(tmp_path: Path, how: str, said: str) -> None:
    with pytest.raises(StageFailed, match=f"training in 2 processes: .*{said}"):
        in_processes("one_fails", tmp_path / "run", how=how)
    for pid in (int(path.read_text()) for path in (tmp_path / "run").glob("*.pid")):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_one_process_alone_shares_nothing() -> None:
    module = torch.nn.Linear(2, 2)
    assert (distributed.world_size(), distributed.rank(), distributed.share(7)) == (1, 0, slice(0, 7))
    assert distributed.replica(module) is module
    assert distributed.mean(0.5) == 0.5
    assert distributed.decided(time.monotonic) <= time.monotonic()
