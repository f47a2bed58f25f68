"""Which bytes an artifact vouches for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deployopt.artifact import Artifact, external_weights
from deployopt.errors import ArtifactCorrupt
from deployopt.runtime.hashing import sha256_file

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def product(path: Path, weights: str | None) -> Path:
    """[batch, 3] × [3, 4], plus the same again by a Constant inside an If; the weights in the file `weights` beside it, or inside. Returns `path`."""
    constant = helper.make_node("Constant", [], ["inner"], value=numpy_helper.from_array(WEIGHT, "inner"))
    branches = [helper.make_graph([constant], name, [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [3, 4])]) for name in ("yes", "no")]
    nodes = [
        helper.make_node("If", ["always"], ["chosen"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Add", ["chosen", "w"], ["sum"]),
        helper.make_node("MatMul", ["x", "sum"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name, width in (("x", 3), ("y", 4))]
    stored = [numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(np.array(True), "always")]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], stored), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path), save_as_external_data=weights is not None, location=weights, size_threshold=16)
    return path


def test_a_whole_file_vouches_for_itself(tmp_path: Path) -> None:
    path = product(tmp_path / "model.onnx", None)
    found = Artifact.of("onnx", path)
    assert (found.sha256, found.size_bytes) == (sha256_file(path), path.stat().st_size)
    path.write_bytes(b"cut off")
    assert external_weights(path) == {}
    with pytest.raises(ArtifactCorrupt, match=r"model\.onnx: wanted sha256"):
        found.verified()


def test_weights_in_another_file_are_vouched_for_too(tmp_path: Path) -> None:
    path, weights = product(tmp_path / "model.onnx", "model.data"), tmp_path / "model.data"
    assert external_weights(path) == {"model.data": weights}
    found = Artifact.of("onnx", path)
    assert found.size_bytes == path.stat().st_size + weights.stat().st_size
    assert found.verified() is found
    swapped = bytearray(weights.read_bytes())
    swapped[5] ^= 1
    weights.write_bytes(swapped)
    with pytest.raises(ArtifactCorrupt, match=r"model\.onnx: wanted sha256"):
        found.verified()
    weights.unlink()
    with pytest.raises(ArtifactCorrupt, match=r"keeps weights in model\.data, missing from its folder") as caught:
        found.verified()
    assert caught.value.remedy == "put model.data beside model.onnx"


def test_a_record_of_the_file_without_its_weights_is_told_from_damage(tmp_path: Path) -> None:
    path = product(tmp_path / "model.onnx", "model.data")
    old = Artifact("onnx", path, sha256_file(path), path.stat().st_size)
    with pytest.raises(ArtifactCorrupt, match=r"model\.onnx is as recorded, .* left out its files of weights \(model\.data\)") as caught:
        old.verified()
    assert "--fresh" in (caught.value.remedy or "")


def test_weights_inside_branches_are_found(tmp_path: Path) -> None:
    path = product(tmp_path / "model.onnx", None)
    model = onnx.load(path)
    inner = model.graph.node[0].attribute[1].g.node[0].attribute[0].t
    inner.data_location = TensorProto.EXTERNAL
    inner.external_data.add(key="location", value="inner.data")
    onnx.save(model, str(path))
    (tmp_path / "inner.data").write_bytes(WEIGHT.tobytes())
    assert external_weights(path) == {"inner.data": tmp_path / "inner.data"}
