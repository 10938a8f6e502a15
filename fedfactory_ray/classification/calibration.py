"""Calibration: one temperature, fitted on validation rows of the data that the classifier was trained on."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

HOTTEST = 100.0
"""Largest temperature, and of the smallest the inverse."""


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T for which log_softmax(`logits` / T), (n, classes), has the best likelihood of `labels`, int (n,) (Guo et
    al. 2017, sec. 4.2). Dividing by it changes no order of the classes.

    Targets are smoothed by the rule of succession, (n_y + 1) / (n_y + classes) for the n_y rows of the true class and
    1 / (n_y + classes) for each other (Platt 1999, sec. 2.2): where all rows are right, plain likelihood would have T
    vanish. Without rows T is 1.
    """
    if not len(labels):
        return 1.0
    scores, (n, classes) = logits.astype(np.float64), logits.shape
    counts = np.bincount(labels, minlength=classes)[labels, None]
    targets = (1 + counts * np.eye(classes)[labels]) / (counts + classes)

    def loss(logarithm: float) -> float:
        return float(-(targets * log_softmax(scores / math.exp(logarithm), axis=1)).sum() / n)

    limit = math.log(HOTTEST)
    return math.exp(minimize_scalar(loss, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-6}).x)
