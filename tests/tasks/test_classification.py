"""Classification metrics against arithmetic and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from deployopt.errors import UsageError
from deployopt.tasks import classification

RANDOM = np.random.default_rng(0)
LOGITS, TARGETS = RANDOM.standard_normal((200, 8)).astype(np.float32), RANDOM.integers(0, 8, 200)
CLASSES = tuple("abcdefgh")


def test_scores_are_scikit_learns() -> None:
    scores = classification.score(LOGITS, TARGETS)
    assert scores["top1"] == pytest.approx(top_k_accuracy_score(TARGETS, LOGITS, k=1))
    assert scores["top5"] == pytest.approx(top_k_accuracy_score(TARGETS, LOGITS, k=5))
    assert scores["n"] == 200
    assert set(classification.score(LOGITS[:, :5], TARGETS % 5)) == {"top1", "n"}


def test_details_are_the_confusion_matrix() -> None:
    details = classification.details(LOGITS, TARGETS, CLASSES)
    assert details["confusion"] == confusion_matrix(TARGETS, LOGITS.argmax(1), labels=range(8)).tolist()
    assert details["classes"] == list(CLASSES)


def test_agreement_is_the_share_of_equal_predictions() -> None:
    other = LOGITS.copy()
    other[:50] = -other[:50]
    assert classification.agree(LOGITS, LOGITS) == {"agreement": 1.0, "max_abs_diff": 0.0}
    assert classification.agree(other, LOGITS)["agreement"] == pytest.approx(0.75)
    assert classification.agree(other, LOGITS)["max_abs_diff"] == pytest.approx(2 * abs(LOGITS[:50]).max())


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (np.zeros((0, 8)), r"found \[0, 8\]"),
        (LOGITS[:5], r"wanted outputs \[200, K\]"),
        (np.where(np.arange(200)[:, None] < 3, np.nan, LOGITS), "3 of 200 images have NaN"),
    ],
)
def test_outputs_that_cannot_be_scored_are_refused(outputs: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classification.score(outputs, TARGETS if len(outputs) else TARGETS[:0])


def test_the_head_has_one_output_a_class() -> None:
    assert classification.head_width(TARGETS, CLASSES) == 8
    with pytest.raises(UsageError, match=r"(?s)float32 targets.*task: regression"):
        classification.head_width(LOGITS, ())
