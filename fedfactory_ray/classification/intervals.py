"""95 % intervals of rates that hold near 0 and 1 too. They cover the sampling of test images, nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, stdtrit

LEVEL = 0.95
SAMPLING = "test sampling only"
"""What an interval of one fit covers: other test images. Another seed would give another fit."""


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"

    @property
    def signed(self) -> str:
        """As text, for a difference."""
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def proportion(right: int, n: int) -> Interval:
    """`right` of `n` (Clopper and Pearson 1934): covers at least as often as it says."""
    low = float(betaincinv(right, n - right + 1, (1 - LEVEL) / 2)) if right else 0.0
    high = float(betaincinv(right + 1, n - right, (1 + LEVEL) / 2)) if right < n else 1.0
    return Interval(right / n, float(low), float(high))


def mean_rate(hits: np.ndarray, totals: np.ndarray) -> Interval:
    """The mean over classes of the rates `hits` / `totals`, int (classes,); classes without images are left out.

    Limits as of directly standardised rates (Fay and Feuer 1997), with beta in the place of gamma distributions: each
    is a quantile of the beta distribution of the rate's mean and variance after one more hit, or miss, where it adds
    most. That holds where no hit or no miss was seen, for which a bootstrap tells an interval of no width.
    """
    seen = totals > 0
    hits, totals = hits[seen], totals[seen]
    value = float((hits / totals).mean())
    return Interval(value, min(value, 1 - _upper(totals - hits, totals)), max(value, _upper(hits, totals)))


def _upper(hits: np.ndarray, totals: np.ndarray) -> float:
    """Upper limit of the mean rate."""
    rates = hits / totals
    step = ((1 - rates) / (totals + 1)).max() / len(totals)
    mean = float(rates.mean() + step)
    variance = float((rates * (1 - rates) / totals).sum() / len(totals) ** 2 + step**2)
    if mean * (1 - mean) <= variance:
        return 1.0
    size = mean * (1 - mean) / variance - 1
    return float(betaincinv(mean * size, (1 - mean) * size, (1 + LEVEL) / 2))


def mean_difference(won: np.ndarray, lost: np.ndarray, totals: np.ndarray) -> Interval:
    """Mean over classes of the rates `won` less `lost`, int (classes,), of `totals` images that two classifiers saw.

    The two rates' intervals are combined by their distances from the rates (Zou and Donner 2008), which are correlated:
    an image is won, lost or neither.
    """
    seen = totals > 0
    won, lost, totals = won[seen], lost[seen], totals[seen]
    gain, loss = mean_rate(won, totals), mean_rate(lost, totals)
    value, wins, losses = gain.value - loss.value, won / totals, lost / totals
    spread = math.sqrt((wins * (1 - wins) / totals).sum() * (losses * (1 - losses) / totals).sum())
    together = float((wins * losses / totals).sum()) / spread if spread else 0.0

    def distance(first: float, second: float) -> float:
        return math.sqrt(first**2 + second**2 + 2 * together * first * second)

    down = distance(gain.value - gain.low, loss.high - loss.value)
    up = distance(gain.high - gain.value, loss.value - loss.low)
    return Interval(value, max(-1.0, value - down), min(1.0, value + up))


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean of a figure over seeds, one fit each (at least two), with Student's t interval: fits and partitions
    vary, the test images do not."""
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * deviation / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half)
