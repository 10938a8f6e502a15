"""FedAvg: the average of the clients' weights."""

from __future__ import annotations

from dataclasses import dataclass

from fedfactory_ray.baselines.interface import Method


@dataclass(frozen=True)
class FedAvg(Method):
    """Federated averaging (McMahan et al. 2017, arXiv 1602.05629, algorithm 1), with a server learning rate η_g
    (Reddi et al. 2021, arXiv 2003.00295, algorithm 1 with SGD on the server).

    Client:  y_i ← y_i - η_l g_i(y_i)
    Server:  x ← x + η_g (Σ_{i∈S} n_i y_i / Σ_{i∈S} n_i - x)
    """

    server_lr: float = 1.0
