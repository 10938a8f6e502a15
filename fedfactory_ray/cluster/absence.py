"""Absence: natural silos whose nodes are gone. Ray would wait for them for ever."""

from __future__ import annotations

import time
from collections.abc import Iterable

from fedfactory_ray.cluster.plan import refuse_unknown_places
from fedfactory_ray.errors import ResourcesError
from fedfactory_ray.settings.config import Config


class Absence:
    """Since when silos that somebody waits for are away. Ask several times in `resources.away_seconds`."""

    def __init__(self, config: Config) -> None:
        self.silos = {silo.name: silo for silo in config.partition.silos}
        self.patience = config.resources.away_seconds
        self.since: dict[str, float] = {}

    def given_up(self, clients: Iterable[str]) -> dict[str, ResourcesError]:
        """Those of `clients` whose silos have had no node for too long, and what they lack."""
        found: dict[str, ResourcesError] = {}
        for client in self.silos.keys() & set(clients):
            try:
                refuse_unknown_places([self.silos[client]])
                self.since.pop(client, None)
            except ResourcesError as refusal:
                if time.monotonic() - self.since.setdefault(client, time.monotonic()) >= self.patience:
                    found[client] = refusal
        return found

    def heard(self, client: str) -> None:
        """Count anew: the client has told something."""
        self.since.pop(client, None)
