"""Evaluation: metrics of predicted log-probabilities under both decision rules, beside the majority-class rate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax, logsumexp

from fedfactory_ray.classification.intervals import Interval, mean_difference, mean_rate, proportion
from fedfactory_ray.classification.metrics import auroc, confusion_matrix, macro_f1
from fedfactory_ray.classification.rules import ALIKE, ANNOUNCED, Ruled


@dataclass(frozen=True)
class Evaluation:
    """Metrics on a test split, by one rule. Recall and AUROC leave classes out that have no test image; intervals cover
    the sampling of test images only."""

    accuracy: Interval
    balanced_accuracy: Interval
    auroc: float
    macro_f1: float
    nll: float
    ece: float
    recall: list[float | None]
    confusion: list[list[int]]
    majority: float
    n_images: int

    def scalars(self) -> dict[str, float]:
        """Flat metrics, for tracking and tables."""
        return {
            "accuracy": self.accuracy.value,
            "accuracy_low": self.accuracy.low,
            "accuracy_high": self.accuracy.high,
            "balanced_accuracy": self.balanced_accuracy.value,
            "balanced_accuracy_low": self.balanced_accuracy.low,
            "balanced_accuracy_high": self.balanced_accuracy.high,
            "auroc": self.auroc,
            "macro_f1": self.macro_f1,
            "nll": self.nll,
            "ece": self.ece,
            "majority": self.majority,
        } | {f"recall_class_{y}": r for y, r in enumerate(self.recall) if r is not None}


def evaluate(logits: np.ndarray, labels: np.ndarray) -> Evaluation:
    """Evaluate log-probabilities up to a constant an image, float (n, classes), against labels, int (n,).

    AUROC is macro one-vs-rest; ECE has 15 equal bins (Guo et al. 2017). Nothing saturates, however certain the
    classifier is: the likelihood and AUROC's order are taken from logarithms. Raises ValueError for logits that are not
    finite.
    """
    if not np.isfinite(logits).all():
        raise ValueError("logits hold values that are not finite; the fit diverged: lower classifier.learning_rate")
    logs = log_softmax(logits.astype(np.float64), axis=1)
    classes = logs.shape[1]
    predicted = logs.argmax(1)
    confusion = confusion_matrix(labels, predicted, classes)
    present = np.flatnonzero(confusion.sum(1))
    recall = [float(confusion[y, y] / confusion[y].sum()) if y in present else None for y in range(classes)]
    aurocs = [auroc(labels == y, log_odds(logs, int(y))) for y in present if len(present) > 1]
    right = np.diag(confusion)
    return Evaluation(
        accuracy=proportion(int(right.sum()), len(labels)),
        balanced_accuracy=mean_rate(right, confusion.sum(1)),
        auroc=float(np.mean(aurocs)) if aurocs else float("nan"),
        macro_f1=macro_f1(confusion),
        nll=float(-logs[np.arange(len(labels)), labels].mean()),
        ece=calibration_error(np.exp(logs), labels),
        recall=recall,
        confusion=confusion.tolist(),
        majority=float(confusion.sum(1).max() / confusion.sum()),
        n_images=len(labels),
    )


def log_odds(logs: np.ndarray, label: int) -> np.ndarray:
    """log p / (1 - p) of a class, from log-probabilities (n, classes): orders images as p does, where p rounds to 1."""
    return np.asarray(logs[:, label] - logsumexp(np.delete(logs, label, axis=1), axis=1))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of the top class over equal bins of confidence (Guo et al. 2017, eq. 3)."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(index, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


@dataclass(frozen=True)
class Judged:
    """A classifier's evaluations by both rules, after division by its `temperature`; `raw_nll` and `raw_ece` are those
    of the second rule before."""

    alike: Evaluation
    announced: Evaluation
    temperature: float
    raw_nll: float
    raw_ece: float

    @property
    def accuracy(self) -> Interval:
        """With the announced prior."""
        return self.announced.accuracy

    @property
    def balanced_accuracy(self) -> Interval:
        """With the classes alike."""
        return self.alike.balanced_accuracy

    def scalars(self) -> dict[str, float]:
        """Flat metrics `<rule>/<name>`, and those of the calibration."""
        by_rule = {ALIKE: self.alike.scalars(), ANNOUNCED: self.announced.scalars()}
        found = {f"{rule}/{name}": value for rule, scalars in by_rule.items() for name, value in scalars.items()}
        raw = {f"{ANNOUNCED}/nll_uncalibrated": self.raw_nll, f"{ANNOUNCED}/ece_uncalibrated": self.raw_ece}
        return found | raw | {"temperature": self.temperature}


def judge(ruled: Ruled, raw: Ruled, labels: np.ndarray, temperature: float = 1.0) -> Judged:
    """Evaluate a classifier's calibrated log-probabilities, and what they were before, against labels, int (n,)."""
    before = evaluate(raw.announced, labels)
    return Judged(evaluate(ruled.alike, labels), evaluate(ruled.announced, labels), temperature, before.nll, before.ece)


@dataclass(frozen=True)
class Difference:
    """What one classifier gains on another, on the same images: accuracy with the announced prior, balanced accuracy
    with the classes alike. Intervals cover the sampling of test images only; over seeds, the fits."""

    accuracy: Interval
    balanced_accuracy: Interval

    def scalars(self) -> dict[str, float]:
        """Flat figures, for tracking and tables."""
        return {
            f"{name}{ending}": value
            for name, interval in vars(self).items()
            for ending, value in zip(("", "_low", "_high"), vars(interval).values(), strict=True)
        }


def paired_difference(first: Ruled, second: Ruled, labels: np.ndarray) -> Difference:
    """Accuracies of `first` less those of `second` on the same images. What the two get right alike cancels."""
    won, lost = _exchanged(first.announced, second.announced, labels)
    classes = np.bincount(labels, minlength=len(won))
    accuracy = mean_difference(*(np.array([each.sum()]) for each in (won, lost, classes)))
    return Difference(accuracy, mean_difference(*_exchanged(first.alike, second.alike, labels), classes))


def _exchanged(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By class, int (classes,): images that `first` alone gets right, and those that `second` alone does."""
    ours, theirs = (logits.argmax(1) == labels for logits in (first, second))
    won, lost = (np.bincount(labels[only], minlength=first.shape[1]) for only in (ours & ~theirs, theirs & ~ours))
    return won, lost
