"""FedProx: local steps are held near the server's weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedfactory_ray.baselines.interface import Method, Vectors


@dataclass(frozen=True)
class FedProx(Method):
    """FedAvg with a proximal term (Li et al. 2020, arXiv 1812.06127, algorithm 2 and eq. 2).

    Client:  y_i ← y_i - η_l (g_i(y_i) + μ (y_i - x)), which descends F_i(y) + μ/2 ‖y - x‖²
    Server:  as FedAvg
    """

    mu: float
    server_lr: float = 1.0

    def direction(self, gradient: Tensor, weights: Tensor, received: Vectors, state: Vectors) -> Tensor:
        """See Method."""
        return gradient + self.mu * (weights - received["weights"])
