"""Processes that train side by side, each on its share of every batch: all that is asked of torch.distributed.

Every process runs the same stage and so the same sequence of the calls below; what they return is the same on all of them, and so is every
decision taken from it. Where one process works alone they return what they were given, so callers need not ask.

What differs from training in one process: BatchNorm normalises each share by the share's own statistics, and the running statistics and
observed ranges that are kept are those of rank 0 (as in DistributedDataParallel); dropout draws anew in each process. Gradients, losses and
scores are those of the whole batch or split, up to rounding.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from deployopt.errors import UsageError

T = TypeVar("T")
FOREVER = timedelta(days=365)  # rank 0 may time candidates for hours; processes that die are noticed by who started them
_on_its_own: ContextVar[bool] = ContextVar("_on_its_own", default=False)


@contextmanager
def joined(rank: int, processes: int, rendezvous: Path, device: str) -> Iterator[None]:
    """Be process `rank` of `processes` on this machine meanwhile.

    Collectives of CPU tensors go over gloo and the loopback interface, those of GPU tensors over NCCL.

    Args:
        rendezvous: a file that does not exist yet, the same for all.
        device: of this process, "cpu" or "cuda:N".
    """
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo looks up the host's name, which containers often cannot resolve
    backend = "gloo"
    if device != "cpu":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=rendezvous.absolute().as_uri(), rank=rank, world_size=processes, timeout=FOREVER)
    yield
    dist.destroy_process_group()  # not after an error: others would fail for the lost connection before this one has said why


@contextmanager
def on_its_own() -> Iterator[None]:
    """For what one process does while the others wait: meanwhile nothing is shared with them."""
    token = _on_its_own.set(True)
    try:
        yield
    finally:
        _on_its_own.reset(token)


def world_size() -> int:
    """Processes that work together, 1 for one alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _on_its_own.get() else 1


def rank() -> int:
    """Of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def share(count: int) -> slice:
    """This process's part of `count` rows, contiguous and as large as the others' up to one row; all rows if there are fewer than processes."""
    size = world_size()
    if count < size:
        return slice(0, count)
    return slice(count * rank() // size, count * (rank() + 1) // size)


def replica(module: nn.Module) -> nn.Module:
    """What to call in training in `module`'s place: it starts from rank 0's weights, and `backward` averages the gradients of all processes.

    Its first call raises UsageError for a trained parameter that the output does not depend on: DistributedDataParallel would wait for its gradient, or
    have to look for such parameters in every step.
    """
    if world_size() == 1:
        return module
    device = next(module.parameters()).device
    shared = DistributedDataParallel(module, device_ids=None if device.type == "cpu" else [device.index])

    def check(_: nn.Module, __: Any, outputs: Tensor) -> None:
        hook.remove()
        _check_reached(module, outputs)

    hook = shared.register_forward_hook(check)
    return shared


def _check_reached(module: nn.Module, outputs: Tensor) -> None:
    trained = {id(parameter): name for name, parameter in module.named_parameters() if parameter.requires_grad}
    reached = _reached(outputs)
    unreached = [name for key, name in trained.items() if key not in reached]
    if unreached:
        raise UsageError(
            f"{world_size()} processes that train together need a gradient of every trained parameter, and the network's output does not depend on "
            f"{', '.join(unreached)}",
            "leave these out of the network or set their requires_grad to False, or train in one process: --nproc 1",
        )


def _reached(outputs: Tensor) -> set[int]:
    """Ids of the parameters that a backward pass from here would give gradients."""
    found: set[int] = set()
    seen = {outputs.grad_fn}
    waiting = [outputs.grad_fn]
    while waiting:
        function = waiting.pop()
        if function is None:
            continue
        if hasattr(function, "variable"):  # AccumulateGrad: a leaf
            found.add(id(function.variable))
        fresh = {following for following, _ in function.next_functions} - seen
        seen |= fresh
        waiting += fresh
    return found


def mean(value: float) -> float:
    """Of all processes' values."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / world_size()


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Give all processes rank 0's buffers: running statistics, ranges and scales."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def gathered(rows: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """All `count` rows [count, …], of which this process has its `share`."""
    if len(rows) == count:
        return rows
    whole = torch.zeros(count, *rows.shape[1:])
    whole[share(count)] = torch.from_numpy(rows)
    dist.all_reduce(whole)  # exact: each row is added to zeros
    return whole.numpy()


def decided(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, which calls it on its own while the others wait."""
    if world_size() == 1:
        return make()
    decision: list[Any] = [None]
    if rank() == 0:
        with on_its_own():
            decision[0] = make()
    dist.broadcast_object_list(decision, src=0, device=torch.device("cpu"))
    chosen: T = decision[0]
    return chosen
