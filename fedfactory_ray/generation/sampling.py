"""Drawing images from a module: the same bytes wherever and whenever a unit is drawn."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedfactory_ray.cluster.devices import autocast
from fedfactory_ray.data.transforms import to_uint8
from fedfactory_ray.generation.samplers import SOLVERS, karras_sigmas, solver_steps
from fedfactory_ray.generation.unet import Denoiser
from fedfactory_ray.seeds import derive_seed
from fedfactory_ray.settings.sections import SamplerConfig


def image_noise(seed: int, index: int, shape: tuple[int, int, int]) -> Tensor:
    """Standard normal float32 noise of one image, from a CPU generator of its own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(derive_seed(seed, index)))


@torch.inference_mode()
def draw_images(
    denoiser: Denoiser,
    config: SamplerConfig,
    n: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    precision: str,
) -> np.ndarray:
    """Draw `n` images, uint8 (n, H, W, C).

    The network always sees `batch_size` images, the last batch being padded, because kernels may round differently
    for other batch sizes; so the first images do not depend on `n`.
    """
    steps = solver_steps(config.solver, config.evaluations)
    sigmas = karras_sigmas(steps, config.sigma_min, config.sigma_max, config.rho)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        with autocast(device, precision):
            return denoiser(x, sigma.to(device, torch.float32).expand(len(x)))

    batches = []
    for start in range(0, n, batch_size):
        noise = torch.stack([image_noise(seed, start + i, denoiser.image_shape) for i in range(batch_size)])
        data = SOLVERS[config.solver](denoise, noise.to(device) * float(sigmas[0]), sigmas)
        batches.append(to_uint8(denoiser.restore(data)))
    return np.concatenate(batches)[:n]
