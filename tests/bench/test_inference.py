import json
from contextlib import contextmanager

import numpy as np
import onnx
import pytest
import stored_runs
import tiny_onnx
from PIL import Image

from deployopt.bench.images import natural_noise
from deployopt.bench.inference import evaluate, open_artifact, predict
from deployopt.data import Dataset
from deployopt.errors import ArtifactError, ArtifactMismatch, StageFailed, UsageError
from deployopt.runtime.hashing import sha256_file
from deployopt.runtime.preprocessing import Preprocessing, apply, decode, to_feed
from deployopt.runtime.progress import SilentProgress
from deployopt.runtime.session import SessionOptions
from deployopt.tasks import classification, regression

RECORDED = Preprocessing(16, resize=20)
CLASSES = tuple("abcdefghij")


class Counting(SilentProgress):
    """Keeps what was tracked and adds up the steps."""

    def __init__(self):
        self.tracked, self.done = [], 0

    @contextmanager
    def track(self, description, total):
        self.tracked.append((description, total))
        yield self

    def advance(self, steps=1, note=""):
        self.done += steps


class Images:
    """A split of noise."""

    def __init__(self, n, size=16):
        self.targets = np.arange(n) % 10
        self._pixels = natural_noise(n, size, size, 3, seed=0)

    def __len__(self):
        return len(self._pixels)

    def images(self, indices):
        return self._pixels[indices]

    def raw(self, index):
        return self._pixels[index]


def dataset(n=70, classes=CLASSES, preprocessing=RECORDED):
    split = Images(n, preprocessing.image_size)
    return Dataset(split, split, split, classes, preprocessing)


@pytest.fixture
def exported(tmp_path):
    """A model that says how its images are preprocessed and what its outputs mean."""
    return exporting(tmp_path / "exported.onnx", CLASSES)


def exporting(path, names, **shape):
    model = onnx.load(tiny_onnx.convolution(path, **shape))
    facts = {"deployopt.preprocessing": json.dumps(RECORDED.to_json()), "deployopt.classes": json.dumps(names)}
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, path)
    return path


@pytest.fixture
def photograph(tmp_path):
    path = tmp_path / "photograph.png"
    Image.fromarray(natural_noise(1, 40, 60, 3, seed=3)[0]).save(path)
    return path


def reference(model, images):
    """Logits of a bare session, for images uint8 [n, H, W, C]."""
    with open_artifact(model, options=SessionOptions(1)) as session:
        return session.infer({"input": to_feed(images)})["logits"]


def test_evaluation_scores_the_whole_split(exported):
    data = dataset()
    found = evaluate(exported, data, classification, progress=SilentProgress())
    expected = (reference(exported, data.test.images(np.arange(70))).argmax(1) == data.test.targets).mean()
    assert found["top1"] == pytest.approx(expected)
    assert (found["primary"], found["n"]) == ("top1", 70)
    assert found["artifact"]["sha256"] == sha256_file(exported)
    assert (found["artifact"]["backend"], found["artifact"]["precision"]) == ("onnxruntime", "fp32")


def test_a_fixed_batch_is_kept(tmp_path):
    model = exporting(tmp_path / "fixed.onnx", CLASSES, batch=4)
    assert evaluate(model, dataset(n=10), classification, progress=SilentProgress())["n"] == 10


@pytest.mark.parametrize(
    ("data", "task", "said"),
    [
        (dataset(preprocessing=RECORDED._replace(resize=None)), classification, r"resize 20 \(the data: None\)"),
        (dataset(classes=tuple("abcdefghik")), classification, "knows the classes"),
        (dataset(), regression, "regression wants float targets"),
    ],
)
def test_a_score_that_would_mean_nothing_is_refused(exported, data, task, said):
    with pytest.raises(UsageError, match=said):
        evaluate(exported, data, task, progress=SilentProgress())


def test_a_model_of_another_width_is_refused(tmp_path):
    model = tiny_onnx.convolution(tmp_path / "wide.onnx", classes=12)
    with pytest.raises(ArtifactMismatch, match="12 outputs, these data need 10"):
        evaluate(model, dataset(), classification, progress=SilentProgress())


def test_prediction_preprocesses_as_evaluation_does(exported, photograph):
    (found,) = predict(exported, [photograph], top=10)
    logits = reference(exported, apply(decode(photograph), RECORDED)[None])[0].astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    assert found["image"] == str(photograph)
    assert [c["name"] for c in found["classes"]] == [CLASSES[i] for i in np.argsort(-probabilities)]
    assert found["classes"][0]["probability"] == pytest.approx(probabilities.max(), abs=1e-5)
    assert sum(c["probability"] for c in found["classes"]) == pytest.approx(1)
    assert len(predict(exported, [photograph] * 3)[2]["classes"]) == 3


def test_a_prediction_tells_how_far_it_is(exported, photograph):
    progress = Counting()
    predict(exported, [photograph] * 40, progress=progress)
    assert progress.tracked == [("predict", 40)]
    assert progress.done >= 40  # the last batch is filled up


def test_predictions_that_are_no_numbers_are_refused(tmp_path, exported, photograph):
    with pytest.raises(StageFailed, match="outputs of 1 of 1 images are NaN or infinite"):
        predict(tiny_onnx.computing_nan(exported, tmp_path / "nan.onnx"), [photograph])


def test_a_regression_predicts_its_outputs(tmp_path, photograph):
    (found,) = predict(exporting(tmp_path / "two.onnx", (), classes=2), [photograph])
    assert set(found) == {"image", "outputs"}
    assert len(found["outputs"]) == 2


def test_a_run_predicts_with_its_recommended_artifact(tmp_path, exported, photograph):
    run = stored_runs.around(exported, recommended={"row": 0, "why": "fastest"})
    assert predict(run, [photograph]) == predict(exported, [photograph]) == predict(f"{run}:qat/onnxruntime/fp32", [photograph])
    stored_runs.around(exported, recommended=None)
    with pytest.raises(UsageError, match="recommends no artifact"):
        predict(run, [photograph])


def test_what_cannot_be_predicted_is_said(tmp_path, model, exported, photograph):
    with pytest.raises(ArtifactMismatch, match="records no preprocessing"):
        predict(model, [photograph])
    with pytest.raises(UsageError, match=r"wanted 2 image files, found nothing at .*absent\.png\n  → give paths of image files"):
        predict(exported, [photograph, tmp_path / "absent.png"])
    with pytest.raises(UsageError, match=r"wanted 9 image files, found nothing at .*4\.png and 4 more\n"):
        predict(exported, [tmp_path / f"{i}.png" for i in range(9)])
    photograph.write_bytes(photograph.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"photograph\.png"):
        predict(exported, [photograph])
