"""Combining experts: their product (Hinton 2002, "Training Products of Experts", eq. 1) and their mean."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def product(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Product of experts: log-probabilities, float64 (n, classes), of Π p_k(y|x)^w_k, normalised over the classes.

    `logits` (experts, n, classes), finite, are each expert's, up to a constant an image; `weights` (experts,) are 1 by
    default. Sums of log-softmax neither underflow nor overflow, however certain the experts are.
    """
    certainty = logits.double().log_softmax(-1)
    if weights is not None:
        certainty = certainty * weights.view(-1, 1, 1)
    return certainty.sum(0).log_softmax(-1)


def mixture(logits: Tensor) -> Tensor:
    """Arithmetic mixture of experts: log-probabilities, float64 (n, classes), of the mean of p_k(y|x); logits as in
    `product`."""
    return logits.double().log_softmax(-1).logsumexp(0) - math.log(len(logits))


class Ensemble(nn.Module):
    """Experts as one classifier for users: uint8 images (n, H, W, C) in, float32 probabilities (n, classes) of their
    product out. One forward pass an expert."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        """The package's one transform (`data.transforms.to_tensor`), every expert's network, product."""
        pixels = images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0
        return product(torch.stack([network(pixels) for network in self.experts])).exp().float()


class Predictor(nn.Module):
    """A fitted classifier for users: uint8 images (n, H, W, C) in, float32 probabilities (n, classes) out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """The package's one transform (`data.transforms.to_tensor`), the network, softmax."""
        pixels = images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0
        return torch.softmax(self.network(pixels), dim=1)
