"""A network as a torch.export graph with a dynamic batch: the start of quantisation and of every export."""

from __future__ import annotations

import contextlib
import copy
import linecache
import logging
import re
import sys
import traceback
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from deployopt.errors import DeployoptError, ExportFailed
from deployopt.nn import parametrizations
from deployopt.runtime.preprocessing import Preprocessing

MAX_BATCH = 4096
aten = torch.ops.aten


def example_input(preprocessing: Preprocessing) -> Tensor:
    """Two grey images, float32 [2, C, H, W] in 0–1. Two, since torch.export takes a batch of one for a constant."""
    size = preprocessing.image_size
    return torch.full((2, preprocessing.channels, size, size), 0.5)


def capture(network: nn.Module, example: Tensor) -> GraphModule:
    """The ATen graph of a copy of `network` in evaluation mode, on the CPU. Parameters keep their module paths; a parametrised one
    is there by the value it has.

    What the mode decides (dropout, BatchNorm) is in the operators' arguments: `train()` and `eval()` of the result change nothing. A Conv2d padded by
    name ("same", "valid") is `aten.conv2d.default` as any other, but where it pads one side more than the other, which only `aten.conv2d.padding` says.

    Args:
        network: takes float32 [N, C, H, W].
        example: one such input with N ≥ 2.

    Raises:
        ExportFailed: torch.export cannot trace it; names the line of source and what torch.export says of the operation.
        UsageError: a `Network` that does not make one tensor.
    """
    module = copy.deepcopy(network).eval().cpu()
    parametrizations.replay(module, parametrizations.modules(module))
    _complete_norms(module)
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    try:
        with _without_graphs():
            program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
    except DeployoptError:
        raise
    except Exception as exc:  # torch.export lets any exception of the model's own code through
        where, reason = _culprit(exc), _first_line(exc)
        if where is None and (where := _fixing_batch(module, example)):
            reason = "the line fits one batch size only"
        raise ExportFailed(
            f"torch.export cannot trace the network {where or '(no line of its own code is in the traceback)'}: {reason}",
            "write that line with tensor operations only (no .item(), no branches on values, no fixed batch size)",
        ) from exc
    graph_module = program.module(check_guards=False)
    for name in ("train", "eval"):  # torch.export replaces them by ones that raise
        vars(graph_module).pop(name, None)
    _number_paddings(graph_module)
    _name_relu6(graph_module)
    return graph_module.eval()


class _WithoutGraphs:
    """A text stream before another, which gets all but the graphs that torch.export prints."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._ends_graph = False

    def write(self, text: str) -> int:
        is_graph = text.lstrip().startswith("def forward(self")
        if not is_graph and not (self._ends_graph and text == "\n"):  # print writes the end of the line by itself
            self._stream.write(text)
        self._ends_graph = is_graph
        return len(text)

    def __getattr__(self, name: str) -> Any:  # whether it is a terminal, its encoding …
        return getattr(self._stream, name)


@contextlib.contextmanager
def _without_graphs() -> Iterator[None]:
    """Without the graph so far that torch.export prints before it lets an exception through, which says what is wrong; warnings and progress pass."""
    told = logging.getLogger("torch.fx.experimental.symbolic_shapes")  # the same exception's text, and that no line of user code was found
    level = told.level
    told.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(cast(Any, _WithoutGraphs(sys.stderr))):
            yield
    finally:
        told.setLevel(level)


def _complete_norms(module: nn.Module) -> None:
    """Give, in place, each BatchNorm without scale and shift ones and zeros: so it folds as any other, and torchao's rewrite, which asks for both, takes it."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and not norm.affine:
            norm.weight = nn.Parameter(torch.ones(norm.num_features), requires_grad=False)
            norm.bias = nn.Parameter(torch.zeros(norm.num_features), requires_grad=False)


def _number_paddings(graph_module: GraphModule) -> None:
    """Write, in place, the paddings of convolutions padded by name as integers, where both sides of each axis get as much."""
    for node in graph_module.graph.find_nodes(op="call_function", target=aten.conv2d.padding):
        given = (*node.args, *(None, [1, 1], "valid", [1, 1], 1)[len(node.args) - 2 :])  # torch.export leaves out trailing defaults
        source, weight, bias, stride, name, dilation, groups = given
        kernel = cast(Node, weight).meta["val"].shape[2:]
        totals = [step * (size - 1) if name == "same" else 0 for step, size in zip(cast("list[int]", dilation), kernel, strict=True)]
        if all(total % 2 == 0 for total in totals):
            node.target = aten.conv2d.default
            node.args = (source, weight, bias, stride, [total // 2 for total in totals], dilation, groups)
    graph_module.recompile()


def _name_relu6(graph_module: GraphModule) -> None:
    """Write, in place, what nn.ReLU6 computes, a hardtanh from 0 to 6, as F.relu6 is: so `nn.placement` knows it for a ReLU."""
    for target in (aten.hardtanh.default, aten.hardtanh_.default):
        for node in graph_module.graph.find_nodes(op="call_function", target=target):
            if tuple(node.args[1:]) == (0, 6):
                node.target, node.args = aten.relu6.default, node.args[:1]
    graph_module.recompile()


def _first_line(exc: BaseException) -> str:
    text = next((line for line in str(exc).splitlines() if line.strip()), "")
    return f"{type(exc).__name__}: {text.strip()}"


def _fixing_batch(module: nn.Module, example: Tensor) -> str | None:
    """The line of a network's own code that depends on the batch size: it fails for another one, or makes other operations of it. None if no line does.

    torch.export only says that some line does.
    """
    graphs = []
    for images in (example, torch.cat([example, example[:1]])):
        try:
            with _without_graphs():
                graphs.append(torch.export.export(module, (images,)).graph)
        except Exception as exc:  # as in `capture`
            return _culprit(exc)
    ways = ([(str(node.target), source_of(node)) for node in graph.nodes if node.op == "call_function"] for graph in graphs)
    shorter, longer = sorted(ways, key=len)
    return next((made[1] for made, other in zip_longest(longer, shorter) if made != other), None)


def _culprit(exc: BaseException) -> str | None:
    """The innermost line of the model's own code in a traceback: "at net.py:12 in forward: `return x.item()`"; None if it holds none."""
    libraries = Path(torch.__file__).parent
    frames = [f for f in traceback.extract_tb(exc.__traceback__) if not _inside(f.filename, libraries) and f.filename != __file__]
    if not frames:
        return None
    frame = frames[-1]
    source = frame.line or linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f"at {Path(frame.filename).name}:{frame.lineno} in {frame.name}: `{source}`"


def source_of(node: Node) -> str | None:
    """The line of the model's own code that made a captured node, as `capture`'s errors write it; None if torch.export recorded none."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.+)', node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not _inside(frame[0], Path(torch.__file__).parent)]
    if not own:
        return None
    filename, line, function, source = own[-1]
    return f"at {Path(filename).name}:{line} in {function}: `{source.strip()}`"


def _inside(filename: str, folder: Path) -> bool:
    return filename.startswith("<") or Path(filename).is_relative_to(folder) or "/contextlib.py" in filename
