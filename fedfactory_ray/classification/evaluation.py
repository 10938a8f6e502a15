"""Evaluation: metrics of predicted log-probabilities, with bootstrap intervals, beside the majority-class rate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax, logsumexp

from fedfactory_ray.classification.metrics import auroc, confusion_matrix, macro_f1

BOOTSTRAP_SAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"

    @property
    def signed(self) -> str:
        """As text, for a difference."""
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True)
class Evaluation:
    """Metrics on a test split. Recall and AUROC leave classes out that have no test image."""

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


def evaluate(logits: np.ndarray, labels: np.ndarray, seed: int = 0) -> Evaluation:
    """Evaluate log-probabilities up to a constant an image, float (n, classes), against labels, int (n,).

    AUROC is macro one-vs-rest; ECE has 15 equal bins (Guo et al. 2017); intervals come from resampling test images
    BOOTSTRAP_SAMPLES times (percentile bootstrap). Nothing saturates, however certain the classifier is: the likelihood
    and AUROC's order are taken from logarithms. Raises ValueError for logits that are not finite.
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
    accuracy, balanced = _bootstrap(confusion, seed)
    return Evaluation(
        accuracy=accuracy,
        balanced_accuracy=balanced,
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


def _bootstrap(confusion: np.ndarray, seed: int) -> tuple[Interval, Interval]:
    """Accuracy and balanced accuracy with intervals. Resampling images is drawing the confusion matrix's cells from a
    multinomial, which costs nothing per image."""

    def figures(matrices: np.ndarray) -> np.ndarray:
        right, truth = np.diagonal(matrices, axis1=-2, axis2=-1), matrices.sum(-1)
        recall = np.divide(right, truth, out=np.full(truth.shape, np.nan), where=truth > 0)
        return np.stack([right.sum(-1) / truth.sum(-1), np.nanmean(recall, -1)])

    draw = np.random.RandomState(seed % 2**32)
    total = confusion.sum()
    resampled = draw.multinomial(total, (confusion / total).ravel(), size=BOOTSTRAP_SAMPLES)
    low, high = np.quantile(figures(resampled.reshape(-1, *confusion.shape)), [0.025, 0.975], axis=1)
    values = figures(confusion)
    accuracy, balanced = (Interval(*map(float, triple)) for triple in zip(values, low, high, strict=True))
    return accuracy, balanced


@dataclass(frozen=True)
class Difference:
    """What one classifier gains on another, on the same images."""

    accuracy: Interval
    balanced_accuracy: Interval

    def scalars(self) -> dict[str, float]:
        """Flat figures, for tracking and tables."""
        return {
            f"{name}{ending}": value
            for name, interval in vars(self).items()
            for ending, value in zip(("", "_low", "_high"), vars(interval).values(), strict=True)
        }


def paired_difference(first: np.ndarray, second: np.ndarray, labels: np.ndarray, seed: int = 0) -> Difference:
    """Accuracies of `first` less those of `second`, logits of the same images (n, classes), with paired bootstrap
    intervals.

    Both are resampled together, so what the two get right alike cancels; an interval without 0 is more than noise.
    """
    gained = (first.argmax(1) == labels).astype(int) - (second.argmax(1) == labels)
    counts = np.zeros((first.shape[1], 3), int)  # by class: lost, alike, won
    np.add.at(counts, (labels, gained + 1), 1)

    def figures(tables: np.ndarray) -> np.ndarray:
        net, truth = tables[..., 2] - tables[..., 0], tables.sum(-1)
        by_class = np.divide(net, truth, out=np.full(truth.shape, np.nan), where=truth > 0)
        return np.stack([net.sum(-1) / truth.sum(-1), np.nanmean(by_class, -1)])

    draw = np.random.RandomState(seed % 2**32)
    resampled = draw.multinomial(len(labels), (counts / len(labels)).ravel(), size=BOOTSTRAP_SAMPLES)
    low, high = np.quantile(figures(resampled.reshape(-1, *counts.shape)), [0.025, 0.975], axis=1)
    return Difference(*(Interval(*map(float, triple)) for triple in zip(figures(counts), low, high, strict=True)))
