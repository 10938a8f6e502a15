"""SCAFFOLD: control variates cancel the clients' drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfactory_ray.baselines.interface import Method, Update, Vectors, weighted_sum


@dataclass(frozen=True)
class Scaffold(Method):
    """Stochastic controlled averaging, option II (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1).

    Client:  y_i ← y_i - η_l (g_i(y_i) - c_i + c)
             c_i⁺ = c_i - c + (x - y_i) / (K η_l); it uploads y_i and c_i⁺ - c_i
    Server:  x as FedAvg;  c ← c + Σ_{i∈S} p_i (c_i⁺ - c_i)

    All start at 0. The paper weighs clients equally (p_i = 1/N); with p_i = n_i / Σ_j n_j over *all* clients, c stays
    Σ_i p_i c_i whoever takes part, which is 0 at a minimum of Σ_i p_i F_i.
    """

    server_lr: float = 1.0

    def start_server(self, weights: Tensor) -> Vectors:
        """See Method."""
        return {"weights": weights, "control": torch.zeros_like(weights)}

    def start_client(self, weights: Tensor) -> Vectors:
        """See Method."""
        return {"control": torch.zeros_like(weights)}

    def extras(self, server: Vectors) -> Vectors:
        """See Method."""
        return {"control": server["control"]}

    def direction(self, gradient: Tensor, weights: Tensor, received: Vectors, state: Vectors) -> Tensor:
        """See Method."""
        return gradient - state["control"] + received["control"]

    def finish(
        self, weights: Tensor, received: Vectors, state: Vectors, steps: int, learning_rate: float
    ) -> tuple[Vectors, Vectors]:
        """See Method."""
        change = (received["weights"] - weights) / (steps * learning_rate) - received["control"]
        return {"weights": weights, "control_change": change}, {"control": state["control"] + change}

    def aggregate(self, server: Vectors, updates: Sequence[Update], n_images: int) -> Vectors:
        """See Method."""
        control = server["control"] + weighted_sum(updates, "control_change", n_images)
        return super().aggregate(server, updates, n_images) | {"control": control}
