"""Products and mixtures of experts, without Ray."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedfactory_ray.classification.ensemble import Predictor, mixture, product
from fedfactory_ray.classification.evaluation import paired_difference
from fedfactory_ray.classification.models import make_classifier
from fedfactory_ray.classification.prediction import score
from fedfactory_ray.classification.rules import Ruled
from fedfactory_ray.data.source import Task

CASES = given(st.integers(1, 6), st.integers(1, 8), st.integers(2, 7), st.integers(0, 10_000))


def some_logits(experts: int, n: int, classes: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randn(experts, n, classes) * 3).float()


@settings(max_examples=30, deadline=None)
@CASES
def test_the_product_is_that_of_the_probabilities(experts: int, n: int, classes: int, seed: int) -> None:
    logits = some_logits(experts, n, classes, seed)
    expected = logits.double().softmax(-1).prod(0)
    expected /= expected.sum(-1, keepdim=True)
    multiplied = product(logits, torch.ones(experts))
    torch.testing.assert_close(multiplied.exp(), expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(product(logits).argmax(1), multiplied.argmax(1)), "equal weights name the same class"
    torch.testing.assert_close(
        mixture(logits).double().exp(), logits.double().softmax(-1).mean(0), rtol=1e-4, atol=1e-7
    )


@settings(max_examples=30, deadline=None)
@CASES
def test_the_order_of_experts_does_not_matter_but_for_rounding(experts: int, n: int, classes: int, seed: int) -> None:
    logits = some_logits(experts, n, classes, seed)
    shuffled = logits[torch.randperm(experts, generator=torch.Generator().manual_seed(seed))]
    for combine in (product, mixture):
        torch.testing.assert_close(combine(shuffled), combine(logits), rtol=1e-5, atol=1e-5)


def test_one_expert_speaks_for_itself() -> None:
    logits = some_logits(1, 5, 4, 0)
    for combine in (product, mixture):
        torch.testing.assert_close(combine(logits), logits[0].double().log_softmax(-1))


def test_experts_that_agree_are_surer_only_where_each_counts_in_full() -> None:
    logits = torch.tensor([[[1.0, 0.0]]]).repeat(3, 1, 1)
    assert product(logits, torch.ones(3))[0].exp()[0] == pytest.approx(1 / (1 + np.exp(-3)))
    assert product(logits)[0].exp()[0] == pytest.approx(1 / (1 + np.exp(-1)))
    assert mixture(logits)[0].exp()[0] == pytest.approx(1 / (1 + np.exp(-1)))


def test_a_constant_added_to_an_experts_logits_changes_nothing() -> None:
    logits = some_logits(3, 4, 5, 1)
    moved = logits + torch.tensor([0.0, 50.0, -9.0]).view(3, 1, 1)
    torch.testing.assert_close(product(moved), product(logits), rtol=1e-4, atol=1e-4)


def test_an_expert_that_is_certain_and_wrong_has_a_veto_in_the_product_only() -> None:
    right = torch.tensor([[4.0, 0.0, 0.0]]).repeat(9, 1, 1)  # nine experts for class 0
    wrong = torch.tensor([[[-1000.0, 1000.0, -1000.0]]])
    logits = torch.cat([right, wrong])
    for combine in (product, mixture):
        found = combine(logits)
        assert torch.isfinite(found).all()
        assert found.exp().sum() == pytest.approx(1)
    assert product(logits).argmax() == 1
    assert mixture(logits).argmax() == 0
    trusted = torch.tensor([1.0] * 9 + [0.01])
    assert product(logits, trusted).argmax() == 0


def test_many_certain_experts_do_not_underflow() -> None:
    logits = torch.full((1000, 1, 3), -80.0)
    logits[:, :, 2] = 80.0
    logits[:600, :, 1], logits[600:, :, 1] = 81.0, 79.0
    found = product(logits, torch.ones(1000))
    assert torch.isfinite(found).all()
    assert found[0, 1] == pytest.approx(0, abs=1e-3)
    assert found[0, 2] == pytest.approx(-200, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_precision_combine_in_double(dtype: torch.dtype) -> None:
    logits = some_logits(4, 3, 5, 2).to(dtype)
    assert product(logits).dtype == mixture(logits).dtype == torch.float64
    torch.testing.assert_close(product(logits), product(logits.double()))


def test_the_predictor_of_experts_is_their_product_divided_by_the_temperature() -> None:
    task = Task(4, 1, 8)
    networks: list[nn.Module] = [make_classifier("cnn", task).eval() for _ in range(3)]
    images = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (7, 8, 8, 1)).astype(np.uint8))
    with torch.inference_mode():
        logits = torch.stack([Predictor([network])(images) for network in networks])
        found = Predictor(networks, temperature=2.0).eval()(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), (product(logits) / 2).log_softmax(1), rtol=1e-4, atol=1e-6)


# Paired comparison


def as_ruled(predicted: np.ndarray) -> Ruled:
    return Ruled.of(np.eye(3)[predicted], np.full(3, 1 / 3))


def test_what_two_classifiers_get_right_alike_does_not_widen_the_interval() -> None:
    labels = np.zeros(400, int)
    first, second = labels.copy(), labels.copy()
    first[:100] = second[:100] = 1  # both wrong
    second[100:120] = 1
    found = paired_difference(as_ruled(first), as_ruled(second), labels).accuracy
    assert found.value == pytest.approx(0.05)
    # A binomial with share 0.05 of 400; unpaired, the interval would be about ±0.06 and hold 0.
    half = 1.96 * np.sqrt(0.05 * 0.95 / 400)
    assert (found.low, found.high) == (pytest.approx(0.05 - half, abs=0.01), pytest.approx(0.05 + half, abs=0.015))
    turned = paired_difference(as_ruled(second), as_ruled(first), labels).accuracy
    assert turned.value == -found.value


def test_a_difference_is_that_of_resampling_images() -> None:
    draw = np.random.RandomState(0)
    labels = draw.randint(0, 3, 200)
    first, second = (np.where(draw.rand(200) < skill, labels, draw.randint(0, 3, 200)) for skill in (0.7, 0.5))
    samples = draw.randint(0, 200, (4000, 200))
    gains = (first == labels).astype(float) - (second == labels)
    by_class = [[gains[s][labels[s] == y].mean() for y in range(3)] for s in samples]
    found = paired_difference(as_ruled(first), as_ruled(second), labels)
    recalls = [gains[labels == y].mean() for y in range(3)]
    for interval, value, resampled in (
        (found.accuracy, gains.mean(), gains[samples].mean(1)),
        (found.balanced_accuracy, np.mean(recalls), np.mean(by_class, axis=1)),
    ):
        low, high = np.quantile(resampled, [0.025, 0.975])
        assert interval.value == pytest.approx(value)
        assert (interval.low, interval.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))


def test_a_classifier_does_not_differ_from_itself() -> None:
    ruled = as_ruled(np.arange(30) % 3)
    found = paired_difference(ruled, ruled, np.zeros(30, int))  # though two classes have no image
    for interval in (found.accuracy, found.balanced_accuracy):
        assert interval.value == 0
        assert -0.2 < interval.low < 0 < interval.high < 0.2, "30 images that show none exclude no small difference"


def test_a_difference_has_accuracy_by_one_rule_and_balanced_accuracy_by_the_other() -> None:
    labels = np.array([0] * 90 + [1] * 10)
    unsure = np.tile([0.0, 0.5], (100, 1))  # class 1, unless class 0 is known to be frequent
    right = np.eye(2)[labels]
    prior = np.array([0.9, 0.1])
    found = paired_difference(Ruled.of(10 * right, prior), Ruled.of(unsure, prior), labels)
    assert found.accuracy.value == pytest.approx(1 - 0.9)
    assert found.balanced_accuracy.value == pytest.approx(1 - 0.5)


# All that is read off the test split


def skilled(labels: np.ndarray, skill: float, seed: int, classes: int = 3) -> torch.Tensor:
    draw = np.random.RandomState(seed)
    return torch.from_numpy(draw.randn(len(labels), classes) + skill * np.eye(classes)[labels]).float()


UNIFORM = np.full(3, 1 / 3)


def test_classifiers_and_experts_are_compared_on_the_same_images() -> None:
    labels = np.arange(60) % 3
    experts = {f"client-{k}": skilled(labels, 1.5, k) for k in range(5)}
    classifier = skilled(labels, 1.0, 9)
    found = score({"fedfactory": classifier}, experts, {}, labels, UNIFORM, {}, {}, {})
    assert list(found.evaluations) == ["fedfactory", "product", "mixture"]
    assert list(found.experts) == list(experts)
    lone = [float((logits.argmax(1).numpy() == labels).mean()) for logits in experts.values()]
    assert [judged.announced.accuracy.value for judged in found.experts.values()] == pytest.approx(lone)
    multiplied = torch.stack([*experts.values()]).log_softmax(2).sum(0).argmax(1).numpy()
    accuracy = (multiplied == labels).mean()
    assert found.evaluations["product"].announced.accuracy.value == pytest.approx(accuracy)
    assert accuracy > max(lone)
    gain = accuracy - float((classifier.argmax(1).numpy() == labels).mean())
    assert found.differences["product"]["fedfactory"].accuracy.value == pytest.approx(gain)
    assert found.differences["product"]["fedfactory"].accuracy.low > 0
    assert list(found.differences) == ["product"]


def test_without_experts_nothing_is_combined() -> None:
    found = score({"fedfactory": some_logits(1, 9, 3, 0)[0]}, {}, {}, np.arange(9) % 3, UNIFORM, {}, {}, {})
    assert (list(found.evaluations), found.experts, found.differences) == (["fedfactory"], {}, {})


def test_weights_and_temperature_change_certainty_and_no_decision_with_the_classes_alike() -> None:
    labels = np.arange(600) % 3
    experts = {f"client-{k}": skilled(labels, 1.5, k) + skilled(labels, 1.0, 50) for k in range(8)}  # much alike
    plain, hot = (score({}, experts, {}, labels, UNIFORM, {}, {"product": t}, {}) for t in (1.0, 3.0))
    before, after = plain.evaluations["product"], hot.evaluations["product"]
    assert after.alike.confusion == before.alike.confusion
    assert after.alike.nll != before.alike.nll
    # As N-fold certainty: what the product was before its weights were 1/N.
    multiplied = torch.stack([*experts.values()]).double().log_softmax(2).sum(0).log_softmax(1)
    assert after.raw_nll == before.raw_nll == pytest.approx(-multiplied[np.arange(600), labels].mean())
    assert before.alike.confusion == plain.evaluations["product"].announced.confusion
    assert before.announced.nll < before.raw_nll
    assert plain.digests == hot.digests


def test_the_announced_prior_counts_once_whatever_the_training_images_had() -> None:
    labels = np.repeat(np.arange(3), [700, 200, 100])
    prior = np.array([0.7, 0.2, 0.1])
    balanced = skilled(labels, 1.0, 0)  # the best classifier where the classes are alike
    natural = balanced + torch.from_numpy(np.log(prior)).float()
    experts = {"a": balanced, "b": balanced}
    found = score(
        {"fedfactory": balanced, "centralised": natural}, experts, {}, labels, prior, {"centralised": prior}, {}, {}
    )
    ours, theirs = found.evaluations["fedfactory"], found.evaluations["centralised"]
    for rule in ("alike", "announced"):
        assert getattr(ours, rule).confusion == getattr(theirs, rule).confusion
        assert getattr(found.evaluations["product"], rule).confusion == getattr(ours, rule).confusion
    assert ours.announced.accuracy.value > ours.alike.accuracy.value + 0.05
    assert ours.announced.nll < ours.alike.nll
    assert ours.alike.balanced_accuracy.value > ours.announced.balanced_accuracy.value


def test_lone_classifiers_are_turned_by_the_prior_of_their_own_images() -> None:
    labels = np.arange(300) % 3
    logits = skilled(labels, 2.0, 0)
    own = np.array([0.98, 0.01, 0.01])
    alone = logits + torch.from_numpy(np.log(own)).float()
    found = score({"local-a": alone}, {}, {"local": ["local-a"]}, labels, UNIFORM, {"local-a": own}, {}, {})
    assert found.evaluations["local-a"].alike.accuracy.value == (logits.argmax(1).numpy() == labels).mean()
    assert found.evaluations["local"].alike.confusion == found.evaluations["local-a"].alike.confusion
