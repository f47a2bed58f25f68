import getpass
import json
import os
import re
from pathlib import Path

import pytest

from deployopt.bench.environment import environment, utc_now, versions, without_folders


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
