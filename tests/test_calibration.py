"""Temperatures and priors: the mathematics."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax

from fedfactory_ray.classification.calibration import fit_temperature
from fedfactory_ray.classification.rules import Ruled, prior_of


def drawn(n: int, classes: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels that are distributed as the softmax of these divided by `scale` says."""
    draw = np.random.RandomState(0)
    logits = 3 * draw.randn(n, classes)
    gumbel = -np.log(-np.log(draw.rand(n, classes)))
    return logits, (logits / scale + gumbel).argmax(1)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 6.0])
def test_the_temperature_that_labels_were_drawn_with_is_found(temperature: float) -> None:
    logits, labels = drawn(20_000, 5, temperature)
    assert fit_temperature(logits.astype(np.float32), labels) == pytest.approx(temperature, rel=0.08)


def test_rows_that_are_all_right_leave_a_finite_certainty() -> None:
    logits = 2.0 * np.eye(4)[np.arange(200) % 4]
    found = fit_temperature(logits, np.arange(200) % 4)
    # The likeliest share of right answers after 200 of 200.
    confidence = np.exp(log_softmax(logits / found, axis=1)).max(1)
    np.testing.assert_allclose(confidence, 201 / 202, rtol=1e-4)


@pytest.mark.parametrize(("classes", "rows"), [(4, 600), (10, 108), (100, 1000)])
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_a_good_classifier_stays_sure_however_many_classes_there_are(classes: int, rows: int, scale: float) -> None:
    """Fitted on a dozen rows a class or more, it tells other rows as well as the true temperature, but for 3 %."""
    ratios = []
    for seed in range(10):
        draw = np.random.RandomState(seed)
        classes_shown = draw.randint(classes, size=rows + 5000)
        logits = 1.5 * draw.randn(rows + 5000, classes) + 7 * np.eye(classes)[classes_shown]
        labels = (logits - np.log(-np.log(draw.rand(*logits.shape)))).argmax(1)
        found = fit_temperature(scale * logits[:rows], labels[:rows])

        def nll(temperature: float) -> float:
            told = log_softmax(scale * logits[rows:] / temperature, axis=1)  # noqa: B023
            return float(-told[np.arange(5000), labels[rows:]].mean())  # noqa: B023

        ratios.append(nll(found) / nll(scale))
    assert np.mean(ratios) < 1.03


def test_without_rows_nothing_is_calibrated() -> None:
    assert fit_temperature(np.empty((0, 3)), np.empty(0, int)) == 1.0


def test_the_prior_is_the_share_of_the_declared_images() -> None:
    np.testing.assert_allclose(prior_of(np.array([60, 30, 10])), [0.6, 0.3, 0.1])
    assert np.isfinite(np.log(prior_of(np.array([60, 0, 10])))).all()
    assert prior_of(np.array([60, 0, 10]))[1] == pytest.approx(1 / 71)


def test_rules_are_bayes_rule() -> None:
    balanced = np.log([[0.5, 0.3, 0.2]])
    prior, trained = np.array([0.1, 0.8, 0.1]), np.array([0.2, 0.2, 0.6])
    ours = Ruled.of(balanced, prior)
    likelihood = np.array([0.5, 0.3, 0.2])
    np.testing.assert_allclose(np.exp(log_softmax(ours.announced, 1))[0], likelihood * prior / (likelihood @ prior))
    theirs = Ruled.of(np.log(np.exp(balanced) * trained) + 5.0, prior, trained)
    for rule in ("alike", "announced"):
        np.testing.assert_allclose(*(log_softmax(getattr(each, rule), 1) for each in (ours, theirs)))
