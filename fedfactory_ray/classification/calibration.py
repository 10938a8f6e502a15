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

    A row's label counts as right with the probability (n + 1) / (n + 2) that the rule of succession gives after n rows,
    and as each other class with an equal part of the rest, as Platt (1999, sec. 2.2) smooths two classes: where all
    rows are right, plain likelihood would have T vanish. Without rows T is 1.
    """
    if not len(labels):
        return 1.0
    scores, (n, classes) = logits.astype(np.float64), logits.shape
    told = np.eye(classes)[labels]
    targets = (told * (n + 1) + (1 - told) / (classes - 1)) / (n + 2)

    def loss(logarithm: float) -> float:
        return float(-(targets * log_softmax(scores / math.exp(logarithm), axis=1)).sum() / n)

    limit = math.log(HOTTEST)
    return math.exp(minimize_scalar(loss, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-6}).x)
