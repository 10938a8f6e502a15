"""Combining experts: their product (Hinton 2002, "Training Products of Experts", eq. 1) and their mean."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def product(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Product of experts: log-probabilities, float64 (n, classes), of Π p_k(y|x)^w_k, normalised over the classes.

    `logits` (experts, n, classes), finite, are each expert's, up to a constant an image. `weights` (experts,) are 1/N
    by default, the logarithmic pool (Genest and Zidek 1986, sec. 3): N experts that have learnt the same are as certain
    as each of them. With weights 1 the best class is the same, with N-fold certainty. Sums of log-softmax neither
    underflow nor overflow, however certain the experts are.
    """
    certainty = logits.double().log_softmax(-1)
    if weights is None:
        return certainty.mean(0).log_softmax(-1)
    return (certainty * weights.view(-1, 1, 1)).sum(0).log_softmax(-1)


def mixture(logits: Tensor) -> Tensor:
    """Arithmetic mixture of experts: log-probabilities, float64 (n, classes), of the mean of p_k(y|x); logits as in
    `product`."""
    return logits.double().log_softmax(-1).logsumexp(0) - math.log(len(logits))


class Predictor(nn.Module):
    """One classifier, or experts as one, for users: uint8 images (n, H, W, C) in; out come the product's
    log-probabilities, float32 (n, classes), calibrated, with the classes alike. One forward pass a network."""

    def __init__(self, networks: Iterable[nn.Module], temperature: float = 1.0) -> None:
        super().__init__()
        self.networks, self.temperature = nn.ModuleList(networks), temperature

    def forward(self, images: Tensor) -> Tensor:
        """The package's one transform (`data.transforms.to_tensor`), every network, product, temperature."""
        pixels = images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0
        pooled = product(torch.stack([network(pixels) for network in self.networks]))
        return (pooled / self.temperature).log_softmax(-1).float()
