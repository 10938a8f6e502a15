"""What a module takes of a GPU's memory, told before anything starts."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from fedfactory_ray.cluster.gpus import Need
from fedfactory_ray.cluster.memory import STATE_BYTES, training_need
from fedfactory_ray.generation.unet import AUGMENTATIONS, Denoiser
from fedfactory_ray.settings.sections import GeneratorConfig

DRAWING_SHARE = 4
"""Drawing saves nothing for a backward pass: it takes less than this part of a training's activations (an H100: 6.0 GB
for 500 images of the published network, whose training would save 42)."""


@cache
def module_need(config: GeneratorConfig, channels: int, resolution: int, precision: str) -> Need:
    """What training one module takes, in `precision`, on images of so many channels and pixels a side.

    The images are those that pass at once (`generator.images_at_once`).
    """

    def loss(network: nn.Module, n: int) -> Tensor:
        images, sigma, told = torch.zeros(n, channels, resolution, resolution), torch.zeros(n), None
        if AUGMENTATIONS[config.augment] > 1:
            told = torch.zeros(n, dtype=torch.long)
        found: Tensor = network.loss(images, sigma, torch.zeros_like(images), told)  # type: ignore[operator]
        return found

    return training_need(lambda: Denoiser(config, channels, resolution), loss, precision)


def drawing_need(training: Need, modules: int) -> Need:
    """A bound of what drawing from so many kept `modules` takes; the images are those of a batch."""
    return Need(modules * training.fixed * 4 // STATE_BYTES, modules * training.per_image // DRAWING_SHARE)
