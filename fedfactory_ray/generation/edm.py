"""EDM: noise levels, preconditioning and loss weight (Karras et al. 2022, "Elucidating the design space").

Data are standardised to standard deviation SIGMA_DATA. A preconditioner turns a network F into a denoiser
D(x; sigma) = skip(x, sigma) + c_out(sigma) F(c_in(sigma) x; c_noise(sigma)), and weighs its squared error.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIGMA_DATA = 0.5
IMAGE_WEIGHT_CAP = 5.0 / SIGMA_DATA**2


def sample_sigma(n: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """Noise levels float32 (n,) on the generator's device, ln(sigma) ~ N(mean, std²) (table 1, training)."""
    return (torch.randn(n, generator=generator, device=generator.device) * std + mean).exp()


def expand(sigma: Tensor) -> Tensor:
    """Noise levels (n,) as (n, 1, 1, 1), to be multiplied with images."""
    return sigma[:, None, None, None]


def c_in(sigma: Tensor) -> Tensor:
    """Input scale that gives the network unit variance (eq. 7)."""
    return (sigma**2 + SIGMA_DATA**2).rsqrt()


def c_noise(sigma: Tensor) -> Tensor:
    """What the network is told of the noise level: ln(sigma) / 4 (table 1)."""
    return sigma.log() / 4


class Residual(nn.Module):
    """EDM's preconditioning (table 1): the network predicts a mix of image and noise, of unit variance."""

    def skip(self, x: Tensor, sigma: Tensor) -> Tensor:
        """c_skip x: the optimal linear denoiser of white data."""
        return x * expand(SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2))

    def c_out(self, sigma: Tensor) -> Tensor:
        """Output scale (n,)."""
        return sigma * SIGMA_DATA * c_in(sigma)

    def weight(self, sigma: Tensor) -> Tensor:
        """Loss weight (n,): 1 / c_out²."""
        return self.c_out(sigma) ** -2


class CleanImage(nn.Module):
    """The network predicts the clean image (Li and He 2025, "Back to basics"), with EDM's loss weight, capped."""

    def skip(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Nothing: the network alone makes the image."""
        return torch.zeros_like(x)

    def c_out(self, sigma: Tensor) -> Tensor:
        """Output scale (n,): the data's deviation."""
        return torch.full_like(sigma, SIGMA_DATA)

    def weight(self, sigma: Tensor) -> Tensor:
        """Loss weight (n,): EDM's, capped, for low noise would otherwise drown the rest."""
        return (Residual().c_out(sigma) ** -2).clamp(max=IMAGE_WEIGHT_CAP)


class Gaussian(nn.Module):
    """EDM's preconditioning with the class's covariance in the place of SIGMA_DATA² I.

    For data N(0, S) the optimal denoiser is linear, S (S + sigma² I)⁻¹ x (Wiener filter; Wang and Vastola 2024
    measure how much of a trained denoiser it explains). Here it is the skip, so that the network learns only what
    is not Gaussian, and c_out² is the error that the Wiener filter leaves per pixel, mean_i l_i sigma² / (l_i + sigma²)
    over the eigenvalues l_i of S. With S = SIGMA_DATA² I both are EDM's own.

    Buffers: basis (k, pixels), the leading principal directions as rows; variances (k,), their eigenvalues; floor (),
    the mean eigenvalue of all other directions.
    """

    def __init__(self, pixels: int, components: int) -> None:
        super().__init__()
        self.register_buffer("basis", torch.zeros(components, pixels))
        self.register_buffer("variances", torch.zeros(components))
        self.register_buffer("floor", torch.zeros(()))
        self.basis: Tensor
        self.variances: Tensor
        self.floor: Tensor

    @torch.no_grad()
    def fit(self, data: Tensor) -> None:
        """Estimate the covariance of standardised, centred data (n, C, H, W), in O(n · pixels · components)."""
        flat = data.reshape(len(data), -1)
        k, pixels = self.basis.shape
        rank = min(k, len(flat) // 2)
        _, values, directions = torch.svd_lowrank(flat, q=min(rank + 16, *flat.shape), niter=4)
        variances = values[:rank].square() / len(flat)
        rest = flat.square().sum() / len(flat) - variances.sum()
        self.basis[:rank] = directions[:, :rank].T
        self.floor.copy_((rest / max(pixels - rank, 1)).clamp(min=1e-5))
        # Components that a small class lacks are zero directions with the floor's variance: without effect.
        self.variances.copy_(self.floor.expand(k))
        self.variances[:rank] = variances

    def skip(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The Wiener filter (n, C, H, W)."""
        flat, noise = x.flatten(1), sigma[:, None] ** 2
        floor = self.floor / (self.floor + noise)
        gain = self.variances / (self.variances + noise) - floor
        return (flat * floor + ((flat @ self.basis.T) * gain) @ self.basis).view_as(x)

    def c_out(self, sigma: Tensor) -> Tensor:
        """Output scale (n,): root mean squared error of the Wiener filter."""
        noise, (k, pixels) = sigma[:, None] ** 2, self.basis.shape
        kept = (self.variances * noise / (self.variances + noise)).sum(1)
        rest = (pixels - k) * (self.floor * noise / (self.floor + noise)).squeeze(1)
        return ((kept + rest) / pixels).sqrt()

    def weight(self, sigma: Tensor) -> Tensor:
        """Loss weight (n,): 1 / c_out²."""
        return self.c_out(sigma) ** -2
