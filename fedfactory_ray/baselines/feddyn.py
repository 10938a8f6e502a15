"""FedDyn: each client's objective is corrected until its minimum is the global one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfactory_ray.baselines.interface import Method, Update, Vectors, weighted_mean, weighted_sum


@dataclass(frozen=True)
class FedDyn(Method):
    """Dynamic regularisation, centred on the server's weights x (Acar et al. 2021, arXiv 2111.04263, algorithm 1).

    Client:  descends F_i(y) - ⟨ĝ_i, y⟩ + α/2 ‖y - x‖²:  y_i ← y_i - η_l (g_i(y_i) - ĝ_i + α (y_i - x))
             ĝ_i ← ĝ_i - α (y_i - x), which is ∇F_i(y_i) where the local problem was solved
    Server:  h ← h - α Σ_{i∈S} p_i (y_i - x);  x ← Σ_{i∈S} n_i y_i / Σ_{i∈S} n_i - h / α

    All start at 0. The paper weighs clients equally (p_i = 1/m); with p_i = n_i / Σ_j n_j over *all* clients,
    h = Σ_i p_i ĝ_i whoever takes part, which is 0 at a minimum of Σ_i p_i F_i. There is no server learning rate.
    """

    alpha: float

    def start_server(self, weights: Tensor) -> Vectors:
        """See Method."""
        return {"weights": weights, "h": torch.zeros_like(weights)}

    def start_client(self, weights: Tensor) -> Vectors:
        """See Method."""
        return {"gradient": torch.zeros_like(weights)}

    def direction(self, gradient: Tensor, weights: Tensor, received: Vectors, state: Vectors) -> Tensor:
        """See Method."""
        return gradient - state["gradient"] + self.alpha * (weights - received["weights"])

    def finish(
        self, weights: Tensor, received: Vectors, state: Vectors, steps: int, learning_rate: float
    ) -> tuple[Vectors, Vectors]:
        """See Method."""
        gradient = state["gradient"] - self.alpha * (weights - received["weights"])
        return {"weights": weights}, {"gradient": gradient}

    def aggregate(self, server: Vectors, updates: Sequence[Update], n_images: int) -> Vectors:
        """See Method."""
        share = sum(update.n_images for update in updates) / n_images
        moved = weighted_sum(updates, "weights", n_images) - share * server["weights"]
        h = server["h"] - self.alpha * moved
        return {"weights": weighted_mean(updates, "weights") - h / self.alpha, "h": h}
