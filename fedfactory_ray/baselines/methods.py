"""The federated methods by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fedfactory_ray.baselines.fedavg import FedAvg
from fedfactory_ray.baselines.feddyn import FedDyn
from fedfactory_ray.baselines.fedprox import FedProx
from fedfactory_ray.baselines.interface import Method
from fedfactory_ray.baselines.scaffold import Scaffold
from fedfactory_ray.sections import FederatedConfig

METHODS: dict[str, Callable[[FederatedConfig], Method]] = {
    "fedavg": lambda settings: FedAvg(settings.server_lr),
    "fedprox": lambda settings: FedProx(settings.prox_mu, settings.server_lr),
    "scaffold": lambda settings: Scaffold(settings.server_lr),
    "feddyn": lambda settings: FedDyn(settings.feddyn_alpha),
}
"""How each is made of the configuration; its instance, a frozen dataclass, holds the settings that it depends on."""


def make_method(name: str, settings: FederatedConfig) -> Method:
    """The method `name` as configured: with its own default learning rate where none is set."""
    method = METHODS[name](settings)
    return method if settings.client_lr is None else replace(method, client_lr=settings.client_lr)
