import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from fedfactory_ray.classification.evaluation import Evaluation, calibration_error, evaluate
from fedfactory_ray.classification.intervals import Interval
from fedfactory_ray.classification.metrics import auroc

# Six images of three classes: five right by their first choice but for images 2 and 5.
PROBABILITIES = np.array(
    [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.5, 0.1, 0.4]]
)
LABELS = np.array([0, 0, 0, 1, 2, 2])


def random_case(n: int, classes: int, seed: int, skill: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.RandomState(seed)
    labels = np.concatenate([np.arange(classes), draw.randint(0, classes, n - classes)])
    scores = draw.randn(n, classes) + skill * np.eye(classes)[labels]
    weights = np.exp(scores)
    return weights / weights.sum(1, keepdims=True), labels


def judge(probabilities: np.ndarray, labels: np.ndarray) -> Evaluation:
    return evaluate(np.log(probabilities), labels)


def test_metrics_computed_by_hand() -> None:
    found = judge(PROBABILITIES, LABELS)
    assert found.accuracy.value == pytest.approx(4 / 6)
    assert found.recall == pytest.approx([2 / 3, 1.0, 1 / 2])
    assert found.balanced_accuracy.value == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
    assert found.confusion == [[2, 1, 0], [0, 1, 0], [1, 0, 1]]
    assert found.majority == pytest.approx(3 / 6)
    assert found.n_images == 6
    # F1 = 2 TP / (2 TP + FP + FN)
    assert found.macro_f1 == pytest.approx((4 / 6 + 2 / 3 + 2 / 3) / 3)
    assert found.nll == pytest.approx(-sum(math.log(p) for p in (0.7, 0.6, 0.2, 0.8, 0.4, 0.4)) / 6)
    # Pairs in the right order: class 0: 0.7 and 0.6 above all three others, 0.2 above 0.1 only; class 1: all five;
    # class 2: both 0.4 above all four others.
    assert found.auroc == pytest.approx(((3 + 3 + 1) / 9 + 5 / 5 + 8 / 8) / 3)


@settings(max_examples=15, deadline=None)
@given(st.integers(20, 120), st.integers(2, 6), st.integers(0, 10_000))
def test_metrics_equal_those_of_sklearn(n: int, classes: int, seed: int) -> None:
    probabilities, labels = random_case(n, classes, seed)
    found, predicted = judge(probabilities, labels), probabilities.argmax(1)
    assert found.accuracy.value == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert found.balanced_accuracy.value == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))
    assert found.macro_f1 == pytest.approx(metrics.f1_score(labels, predicted, average="macro", zero_division=0))
    assert found.nll == pytest.approx(metrics.log_loss(labels, probabilities, labels=range(classes)))
    scores = probabilities if classes > 2 else probabilities[:, 1]
    assert found.auroc == pytest.approx(metrics.roc_auc_score(labels, scores, multi_class="ovr"))
    assert found.recall == pytest.approx(metrics.recall_score(labels, predicted, average=None))
    assert found.confusion == metrics.confusion_matrix(labels, predicted).tolist()
    assert found.majority == pytest.approx(np.bincount(labels).max() / n)


@settings(max_examples=15, deadline=None)
@given(st.integers(10, 60), st.integers(1, 5), st.integers(0, 10_000))
def test_equal_scores_count_half_as_in_sklearn(n: int, levels: int, seed: int) -> None:
    draw = np.random.RandomState(seed)
    positive, scores = np.arange(n) % 3 == 0, draw.randint(0, levels, n).astype(float)
    assert auroc(positive, scores) == pytest.approx(metrics.roc_auc_score(positive, scores))


def test_nothing_saturates_however_certain_the_classifier_is() -> None:
    logits, labels = np.random.RandomState(0).randn(200, 3), np.arange(200) % 3
    found, surer = (evaluate(scale * logits, labels) for scale in (1.0, 1000.0))
    # Probabilities round to 0 and 1 there. In the limit the likelihood is that of the lead over the true class, and
    # images are ordered by a class's lead over the best other one.
    top = np.sort(logits, axis=1)
    assert surer.nll == pytest.approx(1000 * (top[:, 2] - logits[np.arange(200), labels]).mean(), rel=1e-2)
    best_other = [np.delete(logits, y, axis=1).max(1) for y in range(3)]
    aurocs = [metrics.roc_auc_score(labels == y, logits[:, y] - best_other[y]) for y in range(3)]
    assert surer.auroc == pytest.approx(np.mean(aurocs), abs=1e-3)
    assert surer.accuracy == found.accuracy


def test_float16_and_float32_probabilities_are_welcome() -> None:
    probabilities, labels = random_case(200, 4, 0)
    full = judge(probabilities, labels)
    for dtype, tolerance in ((np.float32, 1e-5), (np.float16, 5e-3)):
        found = judge(probabilities.astype(dtype), labels)
        assert found.nll == pytest.approx(full.nll, abs=tolerance)
        assert found.accuracy.value == pytest.approx(full.accuracy.value, abs=0.01)


def test_logits_are_left_as_they_were() -> None:
    probabilities, labels = random_case(50, 3, 0)
    probabilities *= 2
    before = probabilities.copy()
    evaluate(probabilities, labels)
    assert np.array_equal(probabilities, before)


def test_a_perfect_and_a_constant_classifier() -> None:
    labels = np.arange(100) % 4
    perfect = evaluate(100 * np.eye(4)[labels], labels)
    for interval in (perfect.accuracy, perfect.balanced_accuracy):
        assert interval.value == interval.high == 1.0
        assert 0.9 < interval.low < 0.99, "100 images show no more"
    assert (perfect.auroc, perfect.macro_f1, perfect.ece) == (1.0, 1.0, 0.0)
    constant = judge(np.tile([0.4, 0.2, 0.2, 0.2], (100, 1)), labels)
    assert constant.accuracy.value == constant.majority == 0.25
    assert constant.auroc == 0.5
    assert constant.recall == [1.0, 0.0, 0.0, 0.0]
    assert constant.nll == pytest.approx(-(math.log(0.4) + 3 * math.log(0.2)) / 4)


# Calibration


def test_a_calibrated_predictor_has_no_calibration_error() -> None:
    probabilities = np.tile([0.8, 0.2], (100, 1))
    labels = np.array([0] * 80 + [1] * 20)
    assert calibration_error(probabilities, labels) == pytest.approx(0)
    assert judge(probabilities, labels).ece == pytest.approx(0)


def test_overconfidence_is_the_gap_between_confidence_and_accuracy() -> None:
    probabilities = np.tile([0.95, 0.05], (100, 1))
    labels = np.array([0] * 60 + [1] * 40)
    assert calibration_error(probabilities, labels) == pytest.approx(0.35)
    assert judge(probabilities, labels).ece == pytest.approx(0.35)


def test_over_and_underconfidence_in_different_bins_do_not_cancel() -> None:
    sure, unsure = np.tile([0.95, 0.05], (50, 1)), np.tile([0.55, 0.45], (50, 1))
    labels = np.array([0] * 30 + [1] * 20 + [0] * 50)
    # In the first bin 0.95 against 0.6, in the second 0.55 against 1.
    assert calibration_error(np.concatenate([sure, unsure]), labels) == pytest.approx((0.35 + 0.45) / 2)


def test_gaps_of_one_bin_do_cancel() -> None:
    probabilities = np.array([[0.96, 0.04], [0.94, 0.06]] * 50)
    labels = np.array([0] * 95 + [1] * 5)
    assert calibration_error(probabilities, labels) == pytest.approx(0, abs=1e-12)


def test_full_confidence_falls_into_the_last_bin() -> None:
    assert calibration_error(np.tile([1.0, 0.0], (10, 1)), np.array([0] * 7 + [1] * 3)) == pytest.approx(0.3)


@settings(max_examples=30, deadline=None)
@given(st.integers(5, 200), st.integers(2, 6), st.integers(0, 10_000))
def test_calibration_error_equals_its_definition(n: int, classes: int, seed: int) -> None:
    probabilities, labels = random_case(max(n, classes), classes, seed)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    expected = 0.0
    for low in range(15):
        inside = (confidence >= low / 15) & (confidence < (low + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_error(probabilities, labels) == pytest.approx(expected)


# Intervals


@settings(max_examples=10, deadline=None)
@given(st.integers(30, 300), st.integers(2, 5), st.integers(0, 1000))
def test_intervals_hold_their_value_and_stay_within_zero_and_one(n: int, classes: int, seed: int) -> None:
    found = judge(*random_case(n, classes, seed))
    for interval in (found.accuracy, found.balanced_accuracy):
        assert 0 <= interval.low <= interval.value <= interval.high <= 1


def test_intervals_narrow_as_images_grow() -> None:
    widths = []
    for copies in (1, 4, 16):
        probabilities, labels = random_case(100, 3, 0, 1.0)
        found = judge(np.tile(probabilities, (copies, 1)), np.tile(labels, copies))
        widths.append(found.accuracy.high - found.accuracy.low)
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.2)
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.2)


def test_the_accuracys_interval_is_about_the_binomial_one() -> None:
    n, right = 400, 300
    probabilities = np.where(np.arange(n)[:, None] < right, [0.9, 0.1], [0.1, 0.9])
    found = judge(probabilities, np.zeros(n, int)).accuracy
    half = 1.96 * math.sqrt(0.75 * 0.25 / n)
    assert found.low == pytest.approx(0.75 - half, abs=0.006)
    assert found.high == pytest.approx(0.75 + half, abs=0.006)


def test_intervals_are_those_of_resampling_images() -> None:
    probabilities, labels = random_case(150, 3, 1, 1.0)
    predicted, draw = probabilities.argmax(1), np.random.RandomState(0)
    samples = draw.randint(0, 150, (2000, 150))
    balanced = [metrics.balanced_accuracy_score(labels[s], predicted[s]) for s in samples[:500]]
    accuracy = (predicted == labels)[samples].mean(1)
    found = judge(probabilities, labels)
    for interval, resampled in ((found.accuracy, accuracy), (found.balanced_accuracy, balanced)):
        low, high = np.quantile(resampled, [0.025, 0.975])
        assert interval.low == pytest.approx(low, abs=0.03)
        assert interval.high == pytest.approx(high, abs=0.03)


def test_an_interval_reads_well() -> None:
    assert str(Interval(0.5, 0.25, 0.75)) == "0.5000 [0.2500, 0.7500]"


# Edges


def test_a_class_without_test_images_is_left_out() -> None:
    probabilities, labels = random_case(90, 3, 0)
    labels[labels == 1] = 2
    found = judge(probabilities, labels)
    assert found.recall[1] is None
    assert "recall_class_1" not in found.scalars()
    assert found.confusion[1] == [0, 0, 0]
    present = [recall for recall in found.recall if recall is not None]
    assert found.balanced_accuracy.value == pytest.approx(np.mean(present))
    aurocs = [metrics.roc_auc_score(labels == y, probabilities[:, y]) for y in (0, 2)]
    assert found.auroc == pytest.approx(np.mean(aurocs))
    assert all(math.isfinite(value) for value in found.scalars().values())


def test_a_single_class_in_the_test_split_has_no_auroc() -> None:
    found = judge(random_case(20, 3, 0)[0], np.zeros(20, int))
    assert math.isnan(found.auroc)
    assert found.majority == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    logits, labels = random_case(20, 3, 0)
    logits[7, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        evaluate(logits, labels)


def test_scalars_are_flat_and_complete() -> None:
    found = judge(PROBABILITIES, LABELS)
    scalars = found.scalars()
    assert all(isinstance(value, float) for value in scalars.values())
    assert scalars["accuracy_low"] == found.accuracy.low
    assert scalars["balanced_accuracy_high"] == found.balanced_accuracy.high
    assert [scalars[f"recall_class_{y}"] for y in range(3)] == found.recall
    single = {f.name for f in dataclasses.fields(found)} - {"recall", "confusion", "n_images"}
    assert single <= set(scalars)
