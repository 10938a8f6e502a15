"""The federated methods by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedfactory_ray.baselines.fedavg import FedAvg
from fedfactory_ray.baselines.feddyn import FedDyn
from fedfactory_ray.baselines.fedprox import FedProx
from fedfactory_ray.baselines.interface import Method
from fedfactory_ray.baselines.scaffold import Scaffold
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.sections import FederatedConfig

METHODS: dict[str, Callable[[FederatedConfig], Method]] = {
    "fedavg": lambda settings: FedAvg(settings.server_lr, client_lr=settings.fedavg_lr),
    "fedprox": lambda settings: FedProx(settings.prox_mu, settings.server_lr, client_lr=settings.fedprox_lr),
    "scaffold": lambda settings: Scaffold(settings.server_lr, client_lr=settings.scaffold_lr),
    "feddyn": lambda settings: FedDyn(settings.feddyn_alpha, client_lr=settings.feddyn_lr),
}
"""How each is made of the configuration; its instance, a frozen dataclass, holds the settings that it depends on."""

SHARED = {"rounds", "patience", "local_epochs", "client_fraction", "weight_decay", "grad_clip", "validation_every"}
"""Fields of `federated` that every method depends on."""
UNUSED = {
    "epochs",
    "optimizer",
    "learning_rate",
    "weight_decay",
    "validation_fraction",
}
"""Fields of `classifier` that no method depends on: clients descend with plain SGD, round by round."""


def determining(config: Config, method: Method) -> dict[str, Any]:
    """The settings that determine what a method makes of a partition, as JSON values."""
    return {
        "method": [type(method).__name__, vars(method)],
        "federated": config.federated.model_dump(mode="json", include=SHARED),
        "classifier": config.classifier.model_dump(mode="json", exclude=UNUSED),
        "threads": config.resources.client.threads,
        "seed": config.seed,
        "round chosen by": "validation_balanced",
    }
