"""The network that learns in few epochs: its first layer, its logits, its fits."""

from __future__ import annotations

import io

import numpy as np
import pytest
import safetensors.torch
import torch

from fedfactory_ray.classification.batches import Batches, HeldBatches
from fedfactory_ray.classification.fast import BIAS_SCALE, FastNetwork, Whitening
from fedfactory_ray.classification.fitting import Fit
from fedfactory_ray.classification.models import make_classifier
from fedfactory_ray.classification.step import make_optimizer
from fedfactory_ray.data.source import Task
from fedfactory_ray.settings.sections import ClassifierConfig
from fedfactory_ray.storage.layout import STATE
from fedfactory_ray.synthesis.shard import image_table

CPU = torch.device("cpu")
TASK = Task(classes=3, channels=1, resolution=8)
RECIPE = ClassifierConfig(
    model="fast", norm="batch", optimizer="sgd", learning_rate=0.2, weight_decay=1e-3, epochs=3, batch_size=16
)


def smooth_images(n: int, channels: int, side: int) -> torch.Tensor:
    """Images whose neighbours are alike, as real ones are, and whose channels are."""
    noise = torch.randn(n, 1, side, side) + 0.3 * torch.randn(n, channels, side, side)
    return torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1) - 0.4


def batches() -> Batches:
    draw, labels = np.random.RandomState(0), np.arange(96) % 3
    images = draw.randint(0, 60, (96, 8, 8, 1)).astype(np.uint8)
    images[np.arange(96), 2 * labels + 1] += 150
    return HeldBatches(image_table(images, labels, "a"), TASK.image_shape, 16, 5, 0, 1)


def fit() -> Fit:
    return Fit(RECIPE, TASK, 6, 0, CPU)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_first_layer_whitens_patches(channels: int) -> None:
    torch.manual_seed(0)
    layer, images = Whitening(channels), smooth_images(200, channels, 12)
    layer.fit(images)
    found = layer(images).transpose(0, 1).flatten(1)
    half = len(found) // 2
    torch.testing.assert_close(found[half:], -found[:half])
    assert found.mean(1).abs().max() < 1e-3
    torch.testing.assert_close(found[:half].cov(), torch.eye(half), rtol=0, atol=0.1)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_the_first_layer_bears_images_without_variance() -> None:
    layer = Whitening(3)
    layer.fit(torch.full((4, 3, 8, 8), -1.0))
    assert torch.isfinite(layer(torch.full((4, 3, 8, 8), -1.0))).all()


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 9), (1, 28), (3, 32), (3, 64)])
def test_it_takes_small_images_of_every_side(channels: int, side: int, norm: str) -> None:
    network = make_classifier("fast", Task(5, channels, side), norm)  # type: ignore[arg-type]
    logits = network(smooth_images(3, channels, side))
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_where_flips_change_nothing_an_image_and_its_mirror_image_are_judged_alike() -> None:
    images = smooth_images(4, 3, 16)
    for flips, alike in (("none", False), ("horizontal", True), ("dihedral", True)):
        network = make_classifier("fast", Task(5, 3, 16), flips=flips).eval()  # type: ignore[arg-type]
        assert torch.allclose(network(images), network(images.flip(3)), atol=1e-6) == alike
        network.train()
        assert not torch.allclose(network(images), network(images.flip(3)), atol=1e-6)


def test_under_sgd_biases_of_norms_alone_learn_faster_and_decay_alike() -> None:
    network = make_classifier("fast", TASK)
    assert isinstance(network, FastNetwork)
    slow, fast = make_optimizer(RECIPE, network, CPU).param_groups
    assert sum(len(group["params"]) for group in (slow, fast)) == len(list(network.parameters()))
    assert {p.shape for p in fast["params"]} == {(64,), (256,)}
    assert len(fast["params"]) == 6
    assert fast["initial_lr"] == slow["initial_lr"] * BIAS_SCALE
    assert fast["initial_lr"] * fast["weight_decay"] == pytest.approx(slow["initial_lr"] * slow["weight_decay"])
    assert len(make_optimizer(RECIPE.model_copy(update={"optimizer": "adamw"}), network, CPU).param_groups) == 1


def test_a_fit_learns_and_goes_on_from_a_checkpoint_to_the_same_bytes() -> None:
    whole, broken, resumed = fit(), fit(), fit()
    untrained = whole.network.state_dict()["whitening.filters"].clone()
    history = list(whole.epochs(batches(), batches()))
    assert history[-1].validation_accuracy > 0.9
    assert not torch.allclose(whole.best_weights["whitening.filters"], untrained)
    next(broken.epochs(batches(), batches()))
    resumed.load(broken.save())
    list(resumed.epochs(batches(), batches()))
    assert safetensors.torch.save(resumed.best_weights) == safetensors.torch.save(whole.best_weights)
    assert resumed.history == history


def test_a_resumed_fit_keeps_its_own_options_and_layout() -> None:
    broken, resumed = fit(), fit()
    next(broken.epochs(batches(), batches()))
    files = broken.save()
    state = torch.load(io.BytesIO(files[STATE]), weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group |= {"lr": torch.tensor(7.0), "initial_lr": 7.0, "fused": True}
    stream = io.BytesIO()
    torch.save(state, stream)
    resumed.network.to(memory_format=torch.channels_last)
    resumed.load(files | {STATE: stream.getvalue()})
    assert [group["initial_lr"] for group in resumed.optimizer.param_groups] == [0.2, 0.2 * BIAS_SCALE]
    assert not any(group["fused"] for group in resumed.optimizer.param_groups)
    for parameter, values in resumed.optimizer.state.items():
        assert values["momentum_buffer"].stride() == parameter.stride()
