"""Intervals hold as often as they say, also where a bootstrap has no width."""

from __future__ import annotations

import numpy as np
import pytest

from fedfactory_ray.classification.intervals import Interval, mean_difference, mean_rate, over_seeds, proportion

SAMPLES = 800
RETINA, DIGITS = np.array([174, 46, 92, 68, 20]), np.full(10, 54)
"""Test images by class of RetinaMNIST and of the handwritten digits."""


def coverage(truth: float, found: list[Interval]) -> float:
    return float(np.mean([interval.low <= truth <= interval.high for interval in found]))


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.99, 0.998])
def test_accuracys_interval_covers_as_often_as_it_says(rate: float) -> None:
    draws = np.random.RandomState(0).binomial(540, rate, SAMPLES)
    assert coverage(rate, [proportion(int(right), 540) for right in draws]) >= 0.94
    # What was told before: the percentile bootstrap.
    if rate == 0.998:
        quantiles = np.quantile(
            np.random.RandomState(1).binomial(540, draws[:, None] / 540, (SAMPLES, 200)), [0.025, 0.975], axis=1
        )
        assert coverage(rate, [Interval(0, *map(float, each / 540)) for each in quantiles.T]) < 0.8


@pytest.mark.parametrize(
    ("totals", "rates"),
    [
        (DIGITS, np.full(10, 0.998)),
        (DIGITS, np.full(10, 0.98)),
        (DIGITS, np.array([1.0] * 5 + [0.97] * 5)),
        (RETINA, np.array([0.8, 0.2, 0.3, 0.4, 0.3])),
        (RETINA, np.array([0.97, 0.03, 0.05, 0.1, 0.02])),
        (RETINA, np.full(5, 0.99)),
        (np.array([5, 8, 4]), np.full(3, 0.7)),
    ],
)
def test_balanced_accuracys_interval_covers_as_often_as_it_says(totals: np.ndarray, rates: np.ndarray) -> None:
    draws = np.random.RandomState(0).binomial(totals, rates, (SAMPLES, len(totals)))
    found = [mean_rate(hits, totals) for hits in draws]
    assert coverage(rates.mean(), found) >= 0.94
    assert all(0 <= each.low <= each.value <= each.high <= 1 for each in found)


@pytest.mark.parametrize(
    ("totals", "won", "lost"),
    [
        (np.array([400]), [0.15], [0.1]),
        (DIGITS, [0.01] * 10, [0.005] * 10),
        (DIGITS, [0.001] * 10, [0.001] * 10),
        (RETINA, [0.1, 0.2, 0.2, 0.2, 0.3], [0.05, 0.2, 0.1, 0.2, 0.2]),
    ],
)
def test_a_differences_interval_covers_as_often_as_it_says(
    totals: np.ndarray, won: list[float], lost: list[float]
) -> None:
    draw = np.random.RandomState(0)
    drawn = [draw.multinomial(n, [w, x, 1 - w - x], SAMPLES) for n, w, x in zip(totals, won, lost, strict=True)]
    counts = np.stack(drawn, axis=1)  # samples, classes, (won, lost, alike)
    found = [mean_difference(each[:, 0], each[:, 1], totals) for each in counts]
    assert coverage(float(np.mean(won) - np.mean(lost)), found) >= 0.94


def test_nothing_but_right_answers_still_leaves_doubt() -> None:
    found = proportion(540, 540)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.025 ** (1 / 540))  # Clopper and Pearson, by hand
    balanced = mean_rate(DIGITS, DIGITS)
    assert (balanced.value, balanced.high) == (1.0, 1.0)
    assert balanced.low == pytest.approx(found.low, abs=1e-3)


def test_a_mean_over_one_class_is_about_the_exact_interval() -> None:
    exact, found = proportion(30, 40), mean_rate(np.array([30]), np.array([40]))
    assert found.value == exact.value
    assert (found.low, found.high) == (pytest.approx(exact.low, abs=0.02), pytest.approx(exact.high, abs=0.02))


def test_the_interval_over_seeds_is_students() -> None:
    found = over_seeds([0.1, 0.2, 0.3])
    assert found.value == pytest.approx(0.2)
    assert found.high - 0.2 == pytest.approx(0.2 - found.low) == pytest.approx(4.302653 * 0.1 / 3**0.5)
    draw = np.random.RandomState(0).randn(SAMPLES, 3)
    assert coverage(0.0, [over_seeds(each) for each in draw]) == pytest.approx(0.95, abs=0.02)
