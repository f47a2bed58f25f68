"""init → finetune → prune on real digits: every variant leaves the record that reports need, and every run the same bits."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from deployopt.data import Dataset
from deployopt.data._arrays import ArraySet
from deployopt.errors import ExportFailed, StageFailed, UsageError
from deployopt.nn import checkpoint, models
from deployopt.stages import Planning, Point, StepOutput, finetune, init, prune, ptq
from deployopt.tasks import regression

START = [(init, init.Config(fan_out=False)), (finetune, finetune.Config(epochs=2, batch_size=32, warmup_epochs=0.5))]


def pruning(**options: Any) -> prune.Config:
    recovery = {"epochs": 1, "warmup_epochs": 0.0, "batch_size": 32}
    return prune.Config.model_validate({"target": {"macs_ratio": 0.5}, "round_to": 1, "if_not_faster": "ignore", "finetune": recovery, **options})


@pytest.fixture(scope="module")
def trained(run_stages, tmp_path_factory: pytest.TempPathFactory) -> list[StepOutput]:  # type: ignore[no-untyped-def]
    return run_stages(tmp_path_factory.mktemp("trunk"), START)


def test_records_hold_what_reports_need(trained: list[StepOutput]) -> None:
    start, tuned = (s.record for s in trained)
    assert start == {"family": "float", "parent": None}
    assert tuned["accuracy"]["top1"] > 0.8
    assert tuned["accuracy"]["n"] == np.sum(tuned["details"]["confusion"])
    assert [r["epoch"] for r in tuned["curves"]] == [1, 2]
    assert tuned["validation"]["top1"] == tuned["curves"][tuned["kept_epoch"] - 1]["validation_top1"]
    assert (tuned["family"], tuned["parent"]) == ("float", "init")
    assert tuned["size_bytes"] == trained[1].artifacts["model"].path.stat().st_size


def test_weights_that_give_no_numbers_are_named(run_stages, trained: list[StepOutput], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    network = checkpoint.load(trained[-1].folder)
    with torch.no_grad():
        network.state_dict()["body.fc.bias"][1] = float("nan")
    broken = dataclasses.replace(trained[-1], folder=tmp_path / "broken", artifacts={"model": checkpoint.save(tmp_path / "broken", network)})
    with pytest.raises(StageFailed, match="ptq: the network's outputs on 57 of 57 images of the validation split are NaN or infinite") as caught:
        run_stages(tmp_path, [(ptq, ptq.Config(calibration_images=8, sensitivity=True))], [broken])
    assert "what its stages made of the network" in str(caught.value)


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_a_network_that_returns_more_than_logits_ends_before_anything_is_written(  # type: ignore[no-untyped-def]
    run_stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    build = models.build

    def with_auxiliary(*arguments: Any) -> models.Network:
        network = build(*arguments)
        network.body.register_forward_hook(lambda body, _, logits: {"logits": logits} if body.training == (mode == "training") else logits)
        return network

    monkeypatch.setattr(models, "build", with_auxiliary)
    first = [(init, init.Config(fan_out=True))] if mode == "evaluation" else START
    with pytest.raises(UsageError, match=rf"must return one tensor \[N, 3\]; in {mode} mode it returned a dict of logits \(Tensor \[(\d+|N), 3\]\)"):
        run_stages(tmp_path, first)
    assert list(tmp_path.glob(f"{len(first) - 1}-*/*")) == []


def test_a_checkpoint_that_gives_no_numbers_is_named(run_stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Scored on test, as every variant that is not trained first."""
    build = models.build

    def with_nan(*arguments: Any) -> models.Network:
        network = build(*arguments)
        network.state_dict()["body.fc.bias"][0] = float("inf")
        return network

    monkeypatch.setattr(models, "build", with_nan)
    with pytest.raises(StageFailed, match="init: the network's outputs on 161 of 161 images of the test split are NaN or infinite"):
        run_stages(tmp_path, [(init, init.Config())])


class Item(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        if y.abs().max().item() > 1e6:
            y = y * 0
        return cast(torch.Tensor, self.fc(y.mean((2, 3))))


def test_a_network_that_cannot_be_traced_ends_before_it_is_trained(run_stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(models, "_body", lambda *_: Item())
    with pytest.raises(ExportFailed, match=r"cannot trace the network at test_trunk\.py:\d+ in forward: `if y\.abs\(\)\.max\(\)\.item\(\) > 1e6:`"):
        run_stages(tmp_path, START)
    assert [p.name for p in tmp_path.rglob("*")] == ["0-init"]


def test_a_network_that_nothing_will_trace_may_be_trained(run_stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    class ByBatch(Item):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return cast(torch.Tensor, self.fc(torch.stack([row.mean((1, 2)) for row in self.conv(x)])))

    monkeypatch.setattr(models, "_body", lambda *_: ByBatch())
    with pytest.raises(ExportFailed, match="the line fits one batch size only"):
        run_stages(tmp_path / "traced", START)
    steps = run_stages(tmp_path / "not", [(init, init.Config(fan_out=False, traced=False)), START[1]])
    assert "top1" in steps[-1].record["accuracy"]


def test_a_repeated_run_writes_the_same_bytes(run_stages, trained: list[StepOutput], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    plan = [(prune, pruning(importance="taylor", **{"global": True}))]
    again = run_stages(tmp_path / "start", START)
    one, two = run_stages(tmp_path / "one", plan, trained)[-1], run_stages(tmp_path / "two", plan, again)[-1]
    assert again[-1].artifacts["model"].sha256 == trained[-1].artifacts["model"].sha256
    assert one.artifacts["model"].sha256 == two.artifacts["model"].sha256
    assert one.record == two.record


@pytest.mark.parametrize(("target", "metric", "ratio"), [({"params_ratio": 0.4}, "params", 0.4), ({"speedup": 2.5}, "macs", 0.4)])
def test_pruning_in_steps_reaches_its_target_and_recovers_after_each(  # type: ignore[no-untyped-def]
    run_stages, trained: list[StepOutput], tmp_path: Path, target: dict[str, float], metric: str, ratio: float
) -> None:
    step = run_stages(tmp_path, [(prune, pruning(target=target, iterations=2))], trained)[-1]
    assert step.record["pruning"]["target"] == {metric: pytest.approx(ratio)}
    assert step.record["pruning"]["reached"][metric] <= ratio
    assert [r["phase"] for r in step.record["curves"]] == ["prune 1/2", "prune 2/2"]
    loaded = checkpoint.load(step.folder)
    assert len(loaded.lineage) == 2
    assert loaded(torch.rand(2, 3, 8, 8)).shape == (2, 3)


def test_pruning_without_recovery_leaves_the_network_as_cut(run_stages, trained: list[StepOutput], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    step = run_stages(tmp_path, [(prune, pruning(finetune=None))], trained)[-1]
    assert step.record["curves"] == []
    assert step.record["macs"] <= 0.5 * trained[-1].record["macs"]


def test_an_untrained_start_is_scored_when_it_fans_out(run_stages, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (step,) = run_stages(tmp_path, [(init, init.Config())])
    assert step.record["parent"] is None
    assert step.record["accuracy"]["n"] > 100


def test_regression_goes_the_same_way(run_stages, small_digits: Dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    def brightness(images: ArraySet) -> ArraySet:
        stored = np.stack([images.raw(i) for i in range(len(images))])
        return ArraySet(stored, (stored.mean((1, 2))[:, :1] / 255).astype(np.float32), small_digits.preprocessing)

    data = dataclasses.replace(small_digits, classes=(), **{name: brightness(getattr(small_digits, name)) for name in ("train", "validation", "test")})
    steps = run_stages(tmp_path, [*START, (prune, pruning(importance="taylor"))], data=data, task=regression)
    for step in steps[1:]:
        assert set(step.record["accuracy"]) == {"mae", "rmse", "r2", "n"}
        assert step.record["accuracy"]["mae"] < 0.2
    with pytest.raises(UsageError, match="task: classification"):
        run_stages(tmp_path / "wrong", START[:1], task=regression)


@pytest.mark.parametrize("target", [{}, {"macs_ratio": 0.5, "speedup": 2.0}, {"macs_ratio": 1.0}, {"speedup": 1.0}])
def test_a_target_is_exactly_one_possible_figure(target: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        prune.Target(**target)


def test_samples_without_taylor_are_refused() -> None:
    with pytest.raises(ValidationError, match="importance_samples is an option of taylor"):
        pruning(importance_samples=64)
    assert pruning(importance="taylor", importance_samples=64).importance_samples == 64


def test_each_trunk_stage_makes_one_variant_from_the_latest() -> None:
    latest = Point("torch", "init", "float", fans_out=False)
    (step,) = prune.expand(prune.Config(), Planning([latest], "thin"))
    assert step.inputs == (latest,)
    assert step.makes == (Point("torch", "thin", "float"),)
