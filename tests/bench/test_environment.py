import getpass
import json
import os
import re
from pathlib import Path

import pytest

from deployopt.bench.environment import Condition, Load, contract_load, environment, gpu_throttling, utc_now, versions, without_folders
from deployopt.runtime.host import CpuTimes


def test_environment_describes_without_naming():
    found = environment(["numpy", "no-such-distribution"])
    assert found["cpu"]["cores"] >= 1
    assert found["versions"]["no-such-distribution"] is None
    assert re.match(r"\d+\.\d+", found["versions"]["numpy"])
    text = json.dumps(found)
    assert os.getcwd() not in text
    assert f'"{getpass.getuser()}"' not in text


def test_versions_come_from_installed_metadata():
    from importlib.metadata import version

    assert versions(["numpy"]) == {"numpy": version("numpy")}


def test_utc_now_is_iso_with_z():
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", utc_now())


def test_load_leaves_out_the_timed_process():
    load = Load()
    load.add(CpuTimes(100.0, 5.0), CpuTimes(103.0, 5.5), wall_s=2.0, own_cpu_s=2.0)
    load.add(CpuTimes(110.0, 6.0), CpuTimes(113.0, 6.5), wall_s=2.0, own_cpu_s=2.0)
    assert load.other_cores == pytest.approx(0.5)
    assert load.stolen_cores == pytest.approx(0.25)


def test_load_is_unknown_where_it_cannot_be_read():
    load = Load()
    load.add(None, None, wall_s=1.0, own_cpu_s=1.0)
    assert load.other_cores is None
    assert contract_load(load, Condition.now(), Condition.now())["steal_percent"] is None


def test_throttling_is_collected_from_every_gpu_and_moment():
    def condition(*reasons):
        return Condition(None, None, None, [{"name": "GPU", "throttled": list(reasons)}, {"name": "old", "throttled": None}])

    assert gpu_throttling(condition(), condition("software power cap")) == ["GPU: software power cap"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see /usr/lib/python3/site-packages/torch/nn/a.py:12", "see a.py:12"),
        ("node '/layer1/conv/Conv' and https://example.org/usr/lib/x", "node '/layer1/conv/Conv' and https://example.org/usr/lib/x"),
        ("3/4 layers, runs/usr/lib/a.onnx", "3/4 layers, runs/usr/lib/a.onnx"),
        ("cannot read my folder/b.onnx", "cannot read b.onnx"),
    ],
)
def test_a_message_keeps_the_names_of_files_only(text: str, shown: str) -> None:
    assert without_folders(text, Path("my folder")) == shown
