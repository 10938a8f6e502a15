"""Drawing images from a module: the same bytes wherever and whenever a unit is drawn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fedfactory_ray.cluster.capture import Capture
from fedfactory_ray.cluster.devices import AUTOCAST_DTYPES, autocast
from fedfactory_ray.data.transforms import to_uint8
from fedfactory_ray.generation.noise import noise_seed
from fedfactory_ray.generation.samplers import SOLVERS, karras_sigmas, solver_steps
from fedfactory_ray.generation.unet import Denoiser
from fedfactory_ray.settings.sections import SamplerConfig


def image_noise(seed: int, index: int, shape: tuple[int, int, int], attempt: int = 0) -> Tensor:
    """Standard normal float32 noise of one image, from a CPU generator of its own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(noise_seed(seed, index, attempt)))


class Drawing:
    """A denoiser that draws, batch by batch. On a GPU its network computes in `precision` from then on, compiled where
    its settings say so, and a whole batch is one launch; other weights may be loaded into it at any time."""

    def __init__(
        self, denoiser: Denoiser, config: SamplerConfig, batch_size: int, device: torch.device, precision: str
    ) -> None:
        """`denoiser` goes to `device`."""
        self.denoiser, self.config, self.batch_size = denoiser.to(device).eval(), config, batch_size
        self.device, self.precision = device, precision
        self.sigmas = karras_sigmas(
            solver_steps(config.solver, config.evaluations), config.sigma_min, config.sigma_max, config.rho
        )
        if device.type == "cuda":
            nn.Module.to(denoiser.unet, AUTOCAST_DTYPES[precision])  # diffusers' own `to` warns of what is not the case
            if config.compile:
                denoiser.unet.to(memory_format=torch.channels_last)  # slower as it is, but not when compiled
                denoiser.unet.compile(dynamic=False)
        self.noise = torch.empty(batch_size, *denoiser.image_shape, device=device)
        self.solve = Capture(self._solve, device)

    def _denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = torch.full((1,), float(sigma), device=self.device).expand(len(x))
        if self.device.type == "cuda":
            return self.denoiser(x, level)
        with autocast(self.device, self.precision):
            return self.denoiser(x, level)

    def _solve(self) -> Tensor:
        data = SOLVERS[self.config.solver](self._denoise, self.noise * float(self.sigmas[0]), self.sigmas)
        return self.denoiser.restore(data)

    @torch.inference_mode()
    def draw(self, n: int, seed: int, attempts: Mapping[int, int] | None = None) -> np.ndarray:
        """Draw `n` images, uint8 (n, H, W, C), of which `attempts` tells those that need other noise than their first.

        The network always sees `batch_size` images, the last batch being padded, because kernels may round differently
        for other batch sizes; so the first images do not depend on `n`. Raises FloatingPointError for values that are
        not finite.
        """

        def noise(start: int) -> Tensor:
            shape, batch = self.denoiser.image_shape, range(start, start + self.batch_size)
            return torch.stack([image_noise(seed, i, shape, (attempts or {}).get(i, 0)) for i in batch])

        batches, following = [], noise(0)
        for start in range(0, n, self.batch_size):
            self.noise.copy_(following)
            images = self.solve()
            if start + self.batch_size < n:
                following = noise(start + self.batch_size)  # while the device computes
            if not images.isfinite().all():
                raise FloatingPointError("images that it draws hold values that are not finite")
            batches.append(to_uint8(images))
        return np.concatenate(batches)[:n]
