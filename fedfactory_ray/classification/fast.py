"""A network that learns small images in seconds on a GPU (Jordan 2024, arXiv 2404.00498)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 2
WIDTHS = (64, 256, 256)
BIAS_SCALE = 64
"""How many times faster the norms' biases learn than all else under SGD."""
OUTPUT_SCALE = 1 / 9
EPSILON = 5e-4
"""Added to the patches' variances before the division by them, as a share of their mean."""


class Whitening(nn.Module):
    """Frozen 2×2 filters whose outputs are uncorrelated and of unit variance on the images that `fit` saw, and their
    negatives; only what is added learns (sec. 3.2). Random orthogonal filters, until it is fitted."""

    filters: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        size = channels * PATCH**2
        basis = nn.init.orthogonal_(torch.empty(size, size)).view(size, channels, PATCH, PATCH)
        self.register_buffer("filters", torch.cat([basis, -basis]))
        self.bias = nn.Parameter(torch.zeros(2 * size))

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Fit the filters to float images (n, channels, side, side): eigenvectors of their patches' covariance, in
        float64 on the CPU."""
        patches = F.unfold(images.cpu(), PATCH).transpose(1, 2).flatten(0, 1).double()
        variances, vectors = torch.linalg.eigh(patches.T.cov())
        deviations = (variances.clamp(min=0) + EPSILON * variances.mean()).sqrt().clamp(min=1e-6)
        basis = (vectors / deviations).T
        filters = torch.cat([basis, -basis])
        self.filters.copy_(filters.view(self.filters.shape))
        self.bias.copy_(-filters @ patches.mean(0))

    def forward(self, images: Tensor) -> Tensor:
        """Float images (n, channels, side, side) to (n, 8 · channels, side - 1, side - 1)."""
        return F.conv2d(images, self.filters, self.bias)


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    """3×3 convolution that starts as the identity of its inputs, as far as it has outputs for them (sec. 3.3)."""
    made = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(made.weight.data[:inputs])
    return made


class FastNetwork(nn.Module):
    """Whitening, three blocks of two convolutions, a linear layer: 2.0 M parameters, for images of 8 to 64 pixels.

    In evaluation, where `mirrored`, logits are the mean of those of the image and of its mirror image (sec. 3.5).
    """

    def __init__(
        self, channels: int, classes: int, resolution: int, norm: Callable[[int], nn.Module], *, mirrored: bool
    ) -> None:
        super().__init__()
        self.mirrored = mirrored
        self.whitening = Whitening(channels)
        layers: list[nn.Module] = [nn.GELU()]
        inputs, side = 2 * channels * PATCH**2, resolution - PATCH + 1
        for width in WIDTHS:
            pool = min(2, side)
            layers += [conv(inputs, width), nn.MaxPool2d(pool), norm(width), nn.GELU()]
            layers += [conv(width, width), norm(width), nn.GELU()]
            inputs, side = width, side // pool
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Float images (n, channels, side, side) in [-1, 1] to logits (n, classes)."""
        if self.training or not self.mirrored:
            return self.logits(images)
        return (self.logits(images) + self.logits(images.flip(3))) / 2

    def parts(self) -> list[tuple[list[nn.Parameter], int]]:
        """Parameters that learn alike, and how many times faster than the recipe has it (sec. 3.4)."""
        biases = [p for name, p in self.blocks.named_parameters() if name.endswith("bias")]
        others = [p for p in self.parameters() if all(p is not bias for bias in biases)]
        return [(others, 1), (biases, BIAS_SCALE)]

    def logits(self, images: Tensor) -> Tensor:
        """Logits (n, classes) of the images as they are."""
        return self.head(self.blocks(self.whitening(images)).amax((2, 3))) * OUTPUT_SCALE
