"""What federated methods learn with: images held back, gradients, passes, vectors, and how many steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedfactory_ray.baselines import client as actors
from fedfactory_ray.baselines.centralised import baseline_steps, for_steps, reference_config
from fedfactory_ray.baselines.fedavg import FedAvg
from fedfactory_ray.baselines.learner import (
    Images,
    Judgement,
    Learner,
    balanced_accuracy,
    from_message,
    held_back,
    to_message,
)
from fedfactory_ray.classification.models import make_classifier
from fedfactory_ray.data.partition import Partition
from fedfactory_ray.data.source import Task
from fedfactory_ray.data.transforms import to_tensor
from fedfactory_ray.settings.config import Config

TASK = Task(classes=3, channels=1, resolution=8)


def test_every_kth_image_of_a_class_validates_and_a_small_class_trains_whole() -> None:
    share = {0: np.arange(100, 123), 4: np.arange(7)}
    training, validation = held_back(share, 10)
    assert validation[0].tolist() == [109, 119]
    assert (len(training[0]), len(training[4]), len(validation[4])) == (21, 7, 0)
    assert sorted([*training[0], *validation[0]]) == share[0].tolist()


def learner_of(**classifier: Any) -> Learner:
    recipe = {"shift": 0.0, "scale": 0.0, "rotate": 0.0, "precision": "fp32", "batch_size": 8, **classifier}
    federated = {"local_epochs": 2, "weight_decay": 0.01, "grad_clip": 1e9}
    return Learner(Config.model_validate({"classifier": recipe, "federated": federated}), TASK, torch.device("cpu"))


def some_images(n: int) -> Images:
    draw = torch.Generator().manual_seed(0)
    return Images(torch.randint(0, 256, (n, 8, 8, 1), generator=draw, dtype=torch.uint8), torch.arange(n) % 3)


def test_the_gradient_is_that_of_the_recipes_loss_at_the_given_weights() -> None:
    learner, data = learner_of(), some_images(8)
    learner.network[-2].p = 0.0  # no dropout
    weights = learner.model()["weights"] + 0.01
    (gradient, *_) = learner.gradients(data, seed=1)
    found = gradient(weights)
    network = make_classifier("cnn", TASK)
    network[-2].p = 0.0
    torch.nn.utils.vector_to_parameters(weights, network.parameters())
    loss = torch.nn.functional.cross_entropy(network(to_tensor(data.images)), data.labels, label_smoothing=0.05)
    loss = loss + 0.005 * sum(p.square().sum() for p in network.parameters())
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_large_gradients_are_clipped() -> None:
    learner = learner_of()
    learner.settings = learner.settings.model_copy(update={"grad_clip": 0.5})
    gradient = next(iter(learner.gradients(some_images(8), seed=1)))
    assert float(gradient(learner.model()["weights"] * 3).norm()) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(("n", "sizes"), [(8, [8]), (9, [5, 4]), (20, [7, 7, 6]), (1, [1])])
def test_an_epoch_takes_every_image_once_in_equal_batches(n: int, sizes: list[int]) -> None:
    learner, seen = learner_of(), []
    learner._gradient = lambda w, x, y: seen.append(len(y))  # type: ignore[method-assign, assignment]
    for gradient in learner.gradients(some_images(n), seed=1):
        gradient(torch.zeros(1))
    assert seen == sizes * 2


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_models_vectors_are_all_of_its_state(norm: str) -> None:
    learner = learner_of(norm=norm)
    model = {name: vector + 0.1 for name, vector in learner.model().items()}
    assert set(model) == ({"weights", "buffers"} if norm == "batch" else {"weights"})
    learner.load(from_message(to_message(model)))
    assert all(torch.equal(vector, model[name]) for name, vector in learner.model().items())
    held = sum(t.numel() for t in learner.network.state_dict().values() if t.is_floating_point())
    assert sum(map(len, model.values())) == held


def test_statistics_of_batch_norms_are_averaged_by_image_counts() -> None:
    settings = Config.model_validate({"classifier": {"norm": "batch"}})
    server = actors.Server(settings, TASK)
    _, model, _, kept = server.start(FedAvg())
    start = from_message(model)
    uploads = [to_message({name: vector + shift for name, vector in start.items()}) for shift in (1.0, 5.0)]
    _, after, _, _ = server.aggregate(FedAvg(), 40, [30, 10], model, kept, *uploads)
    for name, vector in from_message(after).items():
        torch.testing.assert_close(vector, start[name] + 2.0)


def test_baselines_take_no_fewer_steps_than_the_factorys_classifier() -> None:
    """Whether real images are fewer than the 640 synthetic ones of two classes, or more."""
    for real in (100, 3200):
        share = {label: np.arange(real // 2) for label in (0, 1)}
        partition = Partition(2, {"a": share})
        synthesis = {"images_per_class": 320, "batch_size": 32, "unit_size": 32}
        settings = Config.model_validate({"classifier": {"epochs": 10}, "synthesis": synthesis})
        factory = 10 * (int(max(640, real) * 0.9) // 64)
        assert baseline_steps(settings, partition) == factory
        assert (reference_config(settings, partition) == settings) == (real > 640)
        for images, recipe in [
            (int(real * 0.9), reference_config(settings, partition).classifier),
            *((images, for_steps(settings.classifier, images, factory)) for images in (10, 64, 100)),
        ]:
            steps = recipe.epochs * max(1, images // 64)
            assert factory <= steps < factory + max(1, images // 64)


def test_a_model_is_judged_with_the_classes_alike_class_by_class() -> None:
    learner, data = learner_of(), some_images(30)
    said = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    learner.network = Says(said)  # type: ignore[assignment]
    prior = np.array([0.6, 0.3, 0.1])
    found = learner.judge(data, prior)
    assert found.right == int((said.argmax(1) == data.labels).sum())
    alike = (said - torch.from_numpy(np.log(prior)).float()).argmax(1)
    assert found.held == tuple(int((data.labels == y).sum()) for y in range(3))
    assert found.recalled == tuple(int(((data.labels == y) & (alike == y)).sum()) for y in range(3))


class Says(torch.nn.Module):
    """A network that answers with given logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(images)]


def test_balanced_accuracy_counts_classes_and_not_images_over_all_clients() -> None:
    clients = [Judgement(0.0, 8, 9, (8, 0, 0), (8, 1, 0)), Judgement(0.0, 0, 2, (0, 1, 0), (2, 1, 0))]
    assert balanced_accuracy(clients) == pytest.approx((8 / 10 + 1 / 2) / 2)
