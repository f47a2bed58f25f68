"""What a second run takes from the cache, what it makes anew, and what `plan` says about it beforehand."""

from __future__ import annotations

import json
from pathlib import Path

from cli_runs import TINY, Finished, cached, run, weights

from deployopt import load_recipe, pipeline

MODELS = {"init", "00-finetune", "01-prune", "02-qat"}
EXPORTS = {"03-export-finetune", "03-export-prune", "03-export-qat"}


def test_the_second_run_reuses_models_and_measures_anew(recipe: Path, finished: Finished, cache: Path, tmp_path: Path) -> None:
    second = run(recipe, tmp_path / "second", cache, "--set", "stages.benchmark.accuracy=false")
    assert cached(second) >= MODELS | EXPORTS
    assert "05-benchmark" not in cached(second)
    assert weights(tmp_path / "second") == weights(finished.folder)
    assert weights(finished.folder).keys() == MODELS
    timed = [(a, b) for a, b in zip(finished.document["rows"], second["rows"], strict=True) if a["status"] == "ok"]
    assert timed
    assert all(a["contract"]["started"] < b["contract"]["started"] for a, b in timed)


def test_a_plan_names_what_reruns_and_why(recipe: Path, finished: Finished) -> None:
    made = pipeline.plan(load_recipe(recipe, ["stages.qat.lr=0.001"]), threads=1, cache_home=finished.cache / "deployopt")
    steps = {s.id: s for s in made.steps}
    before_qat = {s.id for s in made.steps if s.runnable and "qat" not in s.id and s.stage_name != "benchmark"}
    assert {"init", "01-prune", "03-export-prune", "04-build-prune-onnxruntime-fp32", "04-build-prune-tensorrt_rtx-fp16"} <= before_qat
    assert {s.id for s in made.steps if s.cached} == before_qat
    assert steps["02-qat"].why == "config.lr: 0.005 → 0.001"
    assert steps["03-export-qat"].why == "an input changed"
    assert steps["04-build-qat-tensorrt-int8"].expansion.why_not
    assert steps["02-qat"].seconds is not None
    assert made.seconds is not None


def test_a_flipped_byte_is_recomputed_and_what_follows_is_kept(recipe: Path, finished: Finished, cache: Path, tmp_path: Path) -> None:
    key = json.loads((finished.folder / "01-prune" / "DONE").read_text())["key"]
    model = cache / "deployopt" / "steps" / key / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    again = run(recipe, tmp_path / "again", cache, "--until", "export")
    assert "01-prune" not in cached(again)
    assert {"init", "00-finetune", "02-qat"} | EXPORTS == cached(again)  # the same weights came out, so nothing after it changed
    assert weights(tmp_path / "again") == weights(finished.folder)


def test_a_name_is_part_of_the_key(recipe: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed.yaml"
    renamed.write_text(TINY.replace("  - finetune: {epochs: 2, batch_size: 128}", "  - finetune: {epochs: 2, batch_size: 128}\n    as: dense"))
    plain, other = (pipeline.plan(load_recipe(p), threads=1).steps for p in (recipe, renamed))
    assert plain[0].key == other[0].key
    assert plain[1].key != other[1].key  # the name seeds the order of the images


def test_where_the_data_lie_is_not_part_of_the_key(tmp_path: Path) -> None:
    from deployopt.data.imagefolder import Config

    assert Config(folder="a", image_size=32).keyed() == Config(folder="b", image_size=32).keyed()
    assert Config(folder="a", image_size=32).keyed() != Config(folder="a", image_size=64).keyed()
