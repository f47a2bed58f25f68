"""What the README says works: its commands are parsed by the real command line, the light ones run, its Python runs on a tiny network."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper

from deployopt.cli import app

TINY = """\
name: tiny
model: {arch: resnet8, stem: cifar}
data: {name: digits, image_size: 8}
stages:
  - finetune: {epochs: 1, batch_size: 256}
  - export: {precisions: [fp32]}
"""
PLACEHOLDERS = {"RECIPE": "tiny.yaml", "DIR": "again", "RUN": "run", "BASE": "run", "NEW": "run"}
VERSIONS = {  # as the support table calls them
    "ONNX Runtime": "onnxruntime-gpu",
    "OpenVINO": "openvino",
    "PyTorch": "torch",
    "TensorRT for RTX": "tensorrt-rtx-cu13",
    "stubs of": "tensorrt-stubs",
}
LIGHT = {"plan", "validate", "list", "schema", "doctor"}


def blocks(repository: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (repository / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def commands(repository: Path, program: str) -> list[list[str]]:
    """Arguments of every call of a program in the README's shell blocks."""
    lines = [shlex.split(line, comments=True) for block in blocks(repository, "bash") for line in block.splitlines()]
    return [line[1:] for line in lines if line and line[0] == program]


def test_every_command_shown_is_one_that_the_command_line_takes(repository: Path) -> None:
    group = typer.main.get_command(app)
    shown = commands(repository, "deployopt")
    assert {"run", "plan", "bench", "compare", "predict", "doctor"} <= {name for name, *_ in shown}
    for name, *arguments in shown:
        group.commands[name].make_context(name, list(arguments))  # type: ignore[attr-defined]  # raises on an unknown option or a missing argument


def test_light_commands_shown_run(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    light = [arguments for arguments in commands(repository, "deployopt") if arguments[0] in LIGHT]
    assert light
    for arguments in light:
        command = [sys.executable, "-m", "deployopt", *[PLACEHOLDERS.get(a, a) for a in arguments]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr


def test_make_targets_shown_exist(repository: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (repository / "Makefile").read_text(), re.MULTILINE)
    assert {target for (target, *_) in commands(repository, "make")} <= set(targets)


def test_files_linked_exist(repository: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (repository / "README.md").read_text())
    assert links
    assert [link for link in links if not (repository / link).exists()] == []


def test_the_support_table_names_the_versions_tested_together(repository: Path) -> None:
    pinned = dict(line.split("==") for line in (repository / "constraints.txt").read_text().splitlines() if "==" in line)
    table = "\n".join(line for line in (repository / "README.md").read_text().splitlines() if line.startswith("| "))
    for name, distribution in VERSIONS.items():
        found = set(re.findall(rf"{name} (\d[\d.]*\d)", table))
        assert found == {".".join(pinned[distribution].split(".")[:2])}, name


@pytest.mark.slow
def test_the_python_shown_runs(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "resnet18_int8.yaml").write_text(TINY)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, 8, 8]) for name in ("input", "output")]
    graph = helper.make_graph([helper.make_node("Relu", ["input"], ["output"])], "g", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(tmp_path / "model.onnx"))
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(repository, "python")
    names = {"batch": np.ones((2, 3, 8, 8), np.float32)}
    exec(compile(code.replace("finetune.epochs=6", "finetune.epochs=1"), "README.md", "exec"), names)
    assert [v["name"] for v in names["report"]["variants"]] == ["finetune"]
    assert names["outputs"]["output"].shape == (2, 3, 8, 8)
