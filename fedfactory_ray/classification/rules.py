"""Decision rules: a classifier with the classes alike, and with the prior that the clients' counts announce."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

ALIKE, ANNOUNCED = "alike", "announced"
"""Names of the rules in logs. Balanced accuracy is the figure of the first, accuracy that of the second."""


def prior_of(counts: np.ndarray) -> np.ndarray:
    """The classes' prior, float64 (classes,), that image counts, int (classes,), announce: their shares. A class of
    which there is no image counts as one, so that its logarithm is finite."""
    floored = np.maximum(counts, 1)
    return np.asarray(floored / floored.sum(), np.float64)


@dataclass(frozen=True)
class Ruled:
    """A classifier's log-probabilities up to a constant an image, (n, classes), under both rules."""

    alike: np.ndarray
    announced: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray, prior: np.ndarray, trained_on: np.ndarray | None = None) -> Self:
        """Of logits (n, classes), calibrated, of a classifier whose training images had the prior `trained_on`,
        (classes,); default: as many of each class.

        Its prior is taken away, and for the second rule `prior` is added (Saerens et al. 2002, eq. 4; Menon et al.
        2021, eq. 9). For images with that prior, the second rule is right most often; the first has the best mean
        recall.
        """
        alike = logits if trained_on is None else logits - np.log(trained_on)
        return cls(alike, alike + np.log(prior))
