import json

import pytest
import torch
from torch import nn

from fedfactory_ray.classification.models import make_classifier
from fedfactory_ray.data.source import Task
from fedfactory_ray.generation.unet import AUGMENTATIONS, Denoiser
from fedfactory_ray.settings.command_line import make_config
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.presets import NOT_RUN, PRESETS

GPU_PRESETS = [name for name, preset in PRESETS.items() if NOT_RUN in preset.description]
CLASSES = {"retinamnist": 5, "bloodmnist": 8, "pathmnist": 9, "cifar10": 10, "isic2019": 8}
CLASSES = {f"{name}-published": classes for name, classes in CLASSES.items()}
CHANNELS = dict.fromkeys(CLASSES, 3)


def resolution_of(config: Config) -> int:
    assert config.data.known_resolution is not None
    return config.data.known_resolution


def distinct(section: str) -> list[str]:
    """Presets without those that build the same network as one before."""
    first: dict[str, str] = {}
    for name in GPU_PRESETS:
        config = make_config(name)
        tree = getattr(config, section).model_dump(mode="json")
        first.setdefault(json.dumps([tree, resolution_of(config), CHANNELS[name]]), name)
    return list(first.values())


def step(network: nn.Module, loss: torch.Tensor) -> None:
    """One step of gradient descent; checks that it reaches every parameter and leaves them finite."""
    assert torch.isfinite(loss)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    before = [p.detach().clone() for p in network.parameters()]
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    assert any(not torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_presets_that_have_not_run_are_the_ones_tested_here() -> None:
    assert sorted(CLASSES) == sorted(GPU_PRESETS)
    assert not any(PRESETS[name].verified for name in GPU_PRESETS)


@pytest.mark.parametrize("name", distinct("generator"))
def test_published_generators_have_their_size_and_train(name: str) -> None:
    config = make_config(name)
    resolution, channels = resolution_of(config), CHANNELS[name]
    torch.manual_seed(0)
    denoiser = Denoiser(config.generator, channels, resolution)
    parameters = sum(p.numel() for p in denoiser.parameters())
    assert 40e6 < parameters < 60e6, f"{parameters / 1e6:.1f} M"
    data = torch.randn(1, channels, resolution, resolution) / 2
    augmentation = torch.tensor([AUGMENTATIONS[config.generator.augment] - 1])
    step(denoiser, denoiser.loss(data, torch.tensor([0.5]), torch.randn_like(data), augmentation))


@pytest.mark.parametrize("name", distinct("classifier"))
def test_published_classifiers_train(name: str) -> None:
    config = make_config(name)
    resolution, channels = resolution_of(config), CHANNELS[name]
    torch.manual_seed(0)
    network = make_classifier(config.classifier.model, Task(CLASSES[name], channels, resolution))
    logits = network(torch.randn(2, channels, resolution, resolution))
    assert logits.shape == (2, CLASSES[name])
    step(network, nn.functional.cross_entropy(logits, torch.tensor([0, 1])))


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in GPU_PRESETS])
def test_cpu_presets_build_and_train(name: str) -> None:
    config = make_config(name)
    torch.manual_seed(0)
    resolution = resolution_of(config)
    denoiser = Denoiser(config.generator, 1, resolution)
    data = torch.randn(4, 1, resolution, resolution) / 2
    step(denoiser, denoiser.loss(data, torch.full((4,), 0.5), torch.randn_like(data)))
