"""Augmentation of classifier batches, on the device, every image in its own way."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fedfactory_ray.data.transforms import augment
from fedfactory_ray.settings.sections import ClassifierConfig

SYMMETRIES = {"none": 1, "horizontal": 2, "dihedral": 8}


def augment_batch(images: Tensor, config: ClassifierConfig, draw: torch.Generator) -> Tensor:
    """Augment float images (n, C, S, S) in [-1, 1] on the generator's device.

    In turn: a symmetry of the square; rotation, zoom and translation in one bilinear resampling (reflected borders);
    contrast and tint; blur; noise. All but the symmetry leave an image as it is where their setting is 0.
    """
    n, device = len(images), images.device

    def uniform(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=draw, device=device) * (high - low) + low

    if SYMMETRIES[config.flips] > 1:
        images = augment(images, torch.randint(SYMMETRIES[config.flips], (n,), generator=draw, device=device))
    if config.rotate or config.scale or config.shift:
        angle = uniform(n) * math.radians(config.rotate)
        zoom = 1 + uniform(n) * config.scale
        cos, sin, shift = angle.cos() * zoom, angle.sin() * zoom, uniform(n, 2) * 2 * config.shift
        theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    if config.contrast or config.tint:
        contrast = 1 + uniform(n, 1, 1, 1) * config.contrast
        images = images * contrast + uniform(n, images.shape[1], 1, 1) * config.tint
    if config.blur:
        blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
        images = torch.lerp(images, blurred, uniform(n, 1, 1, 1, low=0) * config.blur)
    if config.noise:
        deviation = uniform(n, 1, 1, 1, low=0) * config.noise
        images = images + deviation * torch.randn(images.shape, generator=draw, device=device)
    return images
