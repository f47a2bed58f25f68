import numpy as np
import pytest
import tiny_onnx

from deployopt.bench.accuracy import disagreement, outputs_of, score
from deployopt.bench.harness import Group, Settings, Subject
from deployopt.errors import StageFailed
from deployopt.runtime.preprocessing import to_feed
from deployopt.runtime.progress import SilentProgress
from deployopt.tasks import classification, regression


class Split:
    def __init__(self, n):
        rng = np.random.default_rng(0)
        self._images = rng.integers(0, 256, (n, 16, 16, 3), np.uint8)
        self.targets = rng.integers(0, 10, n)

    def __len__(self):
        return len(self._images)

    def images(self, indices):
        return self._images[np.asarray(indices)]


def test_outputs_cover_the_split_in_full_batches():
    sizes = []

    def infer(images):
        sizes.append(len(images))
        return images.reshape(len(images), -1)[:, :10].astype(np.float32)

    split = Split(21)
    outputs = outputs_of(infer, split, batch=8)
    assert sizes == [8, 8, 8]
    np.testing.assert_array_equal(outputs, split.images(range(21)).reshape(21, -1)[:, :10])


def test_scores_the_artifact_in_its_child(tmp_path):
    import onnxruntime

    path, split = tiny_onnx.convolution(tmp_path / "tiny.onnx"), Split(50)
    expected = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"input": to_feed(split.images(range(50)))})[0]
    with Group([Subject("a", "worker_openers:OnnxRuntimeSession", path)], Settings(), SilentProgress()) as group:
        found, outputs = score(lambda images: group.infer("a", images), split, classification, {"": expected, "torch_": -expected}, batch=16)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    assert found["primary"] == "top1"
    assert found["n"] == 50
    assert found["top1"] == np.mean(expected.argmax(1) == split.targets)
    assert found["agreement"] == 1.0
    assert found["max_abs_diff"] < 1e-4
    assert found["torch_agreement"] < 1.0


def test_outputs_that_are_not_finite_fail(tmp_path):
    def infer(images):
        return np.where(np.arange(10) == 3, np.nan, np.zeros((len(images), 10)))

    with pytest.raises(StageFailed, match="5 of 5 images are NaN"):
        score(infer, Split(5), classification)


@pytest.mark.parametrize(
    ("agreement", "n", "shown"),
    [(0.981, 200, "98.1 %"), (9949 / 10_000, 10_000, "99.4 %"), (0.995, 200, None), (0.98, 199, None), (1.0, 10_000, None)],
)
def test_other_answers_than_the_torch_networks_are_told_where_images_are_many(agreement, n, shown):
    note = disagreement({"torch_agreement": agreement, "n": n}, classification, "torch network")
    assert note == (shown and f"{shown} of its answers are those of the torch network; wanted 99.5 %")


def test_agreement_is_not_told_where_there_is_none():
    assert disagreement({"n": 1000, "agreement": 0.5}, classification, "torch network") is None
    assert disagreement({"n": 1000, "torch_agreement": 0.5}, regression, "torch network") is None
