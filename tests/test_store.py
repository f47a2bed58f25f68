from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deployopt import store
from deployopt.errors import RunLocked, UsageError

HOLD = """
import pathlib, sys, time
from deployopt import store
with store.Cache(pathlib.Path(sys.argv[1])).holding(sys.argv[2]):
    print("in", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def put(cache: store.Cache, key: str, parts: dict | None = None, inputs: tuple[str, ...] = (), content: bytes = b"weights") -> store.Entry:
    with cache.holding(key), cache.writing(key) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "model.bin").write_bytes(content)
        return cache.commit(folder, key, parts or {"stage": "finetune", "label": ""}, inputs, 1.5)


def test_a_committed_step_is_found_with_what_was_written(tmp_path: Path) -> None:
    cache = store.Cache(tmp_path)
    made = put(cache, "k1", inputs=("d0",))
    found = cache.find("k1", ("d0",))
    assert isinstance(found, store.Entry)
    assert found == made
    assert (found.folder / "deep" / "model.bin").read_bytes() == b"weights"
    assert found.seconds == 1.5


def test_an_unfinished_step_leaves_nothing(tmp_path: Path) -> None:
    cache = store.Cache(tmp_path)

    def stop_midway() -> None:
        with cache.writing("k1") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        stop_midway()
    assert isinstance(cache.find("k1"), store.Miss)
    assert list((tmp_path / "steps").iterdir()) == []


def test_what_a_killed_writer_left_is_replaced(tmp_path: Path) -> None:
    cache = store.Cache(tmp_path)
    left = tmp_path / "steps" / "k1.partial"
    left.mkdir(parents=True)
    (left / "half").write_text("x")
    renamed_without_done = tmp_path / "steps" / "k2"
    renamed_without_done.mkdir()
    (renamed_without_done / "half").write_text("x")
    assert isinstance(cache.find("k2"), store.Miss)
    for key in ("k1", "k2"):
        assert set(put(cache, key).files) == {"deep/model.bin"}


@pytest.mark.parametrize("damage", ["flip", "remove", "truncate", "done"])
def test_damage_is_a_miss_that_says_so(tmp_path: Path, damage: str) -> None:
    cache = store.Cache(tmp_path)
    entry = put(cache, "k1")
    file = entry.folder / "deep" / "model.bin"
    if damage == "flip":
        file.write_bytes(b"Weights")
    elif damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(b"weig")
    else:
        (entry.folder / "DONE").write_text('{"format": 1, "key"')
    found = cache.find("k1")
    assert isinstance(found, store.Miss)
    assert "damaged" in found.why
    assert isinstance(put(cache, "k1"), store.Entry)
    assert isinstance(cache.find("k1"), store.Entry)


def test_another_input_digest_is_a_miss(tmp_path: Path) -> None:
    cache = store.Cache(tmp_path)
    put(cache, "k1", inputs=("d0",))
    found = cache.find("k1", ("d1",))
    assert isinstance(found, store.Miss)
    assert "input" in found.why


def test_explain_names_the_part_that_changed(tmp_path: Path) -> None:
    cache = store.Cache(tmp_path)
    old = {"stage": "qat", "label": "", "config": {"lr": 0.01, "epochs": 2}, "inputs": ["a"], "seed": 0}
    put(cache, "k1", parts=old)
    miss = cache.explain({**old, "config": {"lr": 0.001, "epochs": 2}}, "")
    assert miss.why == "config.lr: 0.01 → 0.001"
    assert miss.seconds == 1.5
    assert cache.explain({**old, "inputs": ["b"]}, "").why == "an input changed"
    assert cache.explain({**old, "stage": "prune"}, "").why == "not run before"


SUBJECT = {
    "model": {"arch": "resnet18", "weights": None},
    "data": {"name": "digits", "config": {"image_size": 32}, "fingerprint": "a"},
    "task": {"name": "classification"},
}


@pytest.mark.parametrize(
    ("section", "other"),
    [
        ("model", {"arch": "resnet20", "weights": None}),
        ("data", {"name": "digits", "config": {"image_size": 8}, "fingerprint": "a"}),
        ("task", {"name": "ordinal"}),
    ],
)
def test_a_step_on_another_subject_explains_nothing(tmp_path: Path, section: str, other: dict) -> None:
    cache = store.Cache(tmp_path)
    put(cache, "k1", parts={"stage": "finetune", "label": "", **SUBJECT, section: other})
    assert cache.explain({"stage": "finetune", "label": "", **SUBJECT}, "") == store.Miss("not run before", None)


def test_another_version_of_the_subject_is_named_by_the_first_digits_of_its_hash(tmp_path: Path) -> None:
    cache = store.Cache(tmp_path)
    put(cache, "k1", parts={"stage": "finetune", "label": "", **SUBJECT})
    new = {**SUBJECT, "data": {**SUBJECT["data"], "fingerprint": "f" * 64}, "model": {"arch": "resnet18", "weights": "0" * 64}}
    why = cache.explain({"stage": "finetune", "label": "", **new}, "").why
    assert why == "data.fingerprint: a → ffffffffffff…; model.weights: None → 000000000000…"


def test_prune_removes_the_longest_unused_first(tmp_path: Path) -> None:
    cache = store.Cache(tmp_path)
    for number, key in enumerate(("old", "middle", "new")):
        entry = put(cache, key, content=bytes(1000))
        os.utime(entry.folder / "DONE", (number, number))
    store.touch(next(e for e in cache.entries() if e.key == "old"))
    removed, left = cache.prune(2500)
    assert (removed, left) == (1, 2000)
    assert {e.key for e in cache.entries()} == {"old", "new"}
    assert cache.prune(0) == (2, 0)


def test_prune_takes_what_killed_runs_left_and_spares_what_is_held(tmp_path: Path) -> None:
    cache = store.Cache(tmp_path)
    put(cache, "held")
    put(cache, "free")
    (tmp_path / "steps" / "k.partial").mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), "held", "60"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        assert cache.prune(0)[0] == 1
        assert {p.name for p in (tmp_path / "steps").iterdir()} == {"held"}
        other.kill()
    assert cache.prune(0) == (1, 0)


def test_what_is_spared_is_kept_however_small_the_cap(tmp_path: Path) -> None:
    cache = store.Cache(tmp_path)
    for number, key in enumerate(("used", "unused")):
        os.utime(put(cache, key).folder / "DONE", (number, number))
    assert cache.prune(0, spare={"used"}) == (1, 7)
    assert [e.key for e in cache.entries()] == ["used"]


def test_choices_and_durations_go_with_the_steps(tmp_path: Path) -> None:
    cache = store.Cache(tmp_path)
    for number, key in enumerate(("old", "new")):
        os.utime(put(cache, key).folder / "DONE", (10 + number, 10 + number))
    for age, key in ((11, "old"), (5, "new"), (9, "forgotten"), (12, "killed")):
        choices = cache.choices(key, ("d0",))
        choices.get_or_make("round_to", lambda: 8)
        os.utime(choices.path, (age, age))
    for age, kind in ((9, "slow"), (11, "quick")):
        cache.remember_seconds(kind, 1.0)
        os.utime(tmp_path / "durations" / f"{kind}.json", (age, age))
    assert cache.prune(7)[0] == 1
    assert {p.name.partition("-")[0] for p in (tmp_path / "choices").iterdir()} == {"new", "killed"}
    assert (cache.seconds("slow"), cache.seconds("quick")) == (None, 1.0)


@pytest.mark.parametrize(("text", "size"), [(None, 20 * 10**9), ("", 20 * 10**9), ("1.5GB", 15 * 10**8), ("500 mb", 5 * 10**8), ("0", 0)])
def test_the_cap_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, text: str | None, size: int) -> None:
    monkeypatch.delenv("DEPLOYOPT_CACHE_MAX_SIZE", raising=False)
    if text is not None:
        monkeypatch.setenv("DEPLOYOPT_CACHE_MAX_SIZE", text)
    assert store.size_cap() == size


@pytest.mark.parametrize("text", ["much", "-1GB", "nan", "infGB"])
def test_a_cap_that_is_no_size_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DEPLOYOPT_CACHE_MAX_SIZE", text)
    with pytest.raises(UsageError, match=f"DEPLOYOPT_CACHE_MAX_SIZE: wanted a size such as 20GB or 500MB; found '{text}'"):
        store.size_cap()


def test_a_second_maker_waits_and_says_so(tmp_path: Path) -> None:
    cache = store.Cache(tmp_path)
    waited: list[str] = []
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), "k", "1"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with cache.holding("k", lambda: waited.append("waiting")):
            assert other.wait() == 0
    assert waited == ["waiting"]


def test_a_linked_run_survives_pruning(tmp_path: Path) -> None:
    cache = store.Cache(tmp_path / "cache")
    entry = put(cache, "k1")
    store.link(entry, tmp_path / "run" / "00-finetune")
    cache.prune(0)
    assert (tmp_path / "run" / "00-finetune" / "deep" / "model.bin").read_bytes() == b"weights"
    assert json.loads((tmp_path / "run" / "00-finetune" / "DONE").read_text())["key"] == "k1"


def test_choices_outlive_the_process_that_made_them(tmp_path: Path) -> None:
    made = []

    def measure() -> list[int]:
        made.append(1)
        return [8, 16]

    assert store.Cache(tmp_path).choices("k", ("d0",)).get_or_make("round_to", measure) == [8, 16]
    assert store.Cache(tmp_path).choices("k", ("d0",)).get_or_make("round_to", measure) == [8, 16]
    assert len(made) == 1
    store.Cache(tmp_path).choices("k", ("d0",), fresh=True).get_or_make("round_to", measure)
    assert len(made) == 2


def test_choices_about_other_inputs_are_made_anew(tmp_path: Path) -> None:
    cache = store.Cache(tmp_path)
    assert cache.choices("k", ("d0",)).get_or_make("float_layers", lambda: ["conv1"]) == ["conv1"]
    assert cache.choices("k", ("d1",)).get_or_make("float_layers", lambda: ["fc"]) == ["fc"]
    assert cache.choices("k", ("d0",)).get_or_make("float_layers", list) == ["conv1"]


def test_the_second_process_in_a_run_folder_is_refused_by_name(tmp_path: Path) -> None:
    code = "import sys, pathlib; from deployopt import store\nwith store.locked(pathlib.Path(sys.argv[1])):\n    print('in', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "in\n"
        with pytest.raises(RunLocked, match=f"process {first.pid}"), store.locked(tmp_path):
            raise AssertionError("both are in")
        first.kill()
    with store.locked(tmp_path):  # a killed process leaves no lock behind
        assert (tmp_path / ".owner.json").exists()
    assert not (tmp_path / ".owner.json").exists()
