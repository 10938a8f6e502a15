"""The federated methods by name."""

from __future__ import annotations

from collections.abc import Callable

from fedfactory_ray.baselines.fedavg import FedAvg
from fedfactory_ray.baselines.feddyn import FedDyn
from fedfactory_ray.baselines.fedprox import FedProx
from fedfactory_ray.baselines.interface import Method
from fedfactory_ray.baselines.scaffold import Scaffold
from fedfactory_ray.sections import FederatedConfig

METHODS: dict[str, Callable[[FederatedConfig], Method]] = {
    "fedavg": lambda settings: FedAvg(settings.server_lr, client_lr=settings.fedavg_lr),
    "fedprox": lambda settings: FedProx(settings.prox_mu, settings.server_lr, client_lr=settings.fedprox_lr),
    "scaffold": lambda settings: Scaffold(settings.server_lr, client_lr=settings.scaffold_lr),
    "feddyn": lambda settings: FedDyn(settings.feddyn_alpha, client_lr=settings.feddyn_lr),
}
"""How each is made of the configuration; its instance, a frozen dataclass, holds the settings that it depends on."""
