"""Absence: natural silos whose nodes are gone. Ray would wait for them for ever."""

from __future__ import annotations

import time
from collections.abc import Iterable

from ray.exceptions import ActorUnschedulableError, RayError

from fedfactory_ray.cluster import refuse_unknown_places
from fedfactory_ray.config import Config
from fedfactory_ray.errors import ResourcesError

AWAY_SECONDS = 600.0
"""A natural silo whose nodes are gone for so long, while nobody else has anything to tell, is given up."""


class Absence:
    """Since when silos are away. Ask at least every AWAY_SECONDS while nothing comes."""

    def __init__(self, config: Config) -> None:
        self.silos = {silo.name: silo for silo in config.partition.silos}
        self.since: dict[str, float] = {}

    def given_up(self, clients: Iterable[str]) -> dict[str, RayError]:
        """Those of `clients` whose silos have had no node for AWAY_SECONDS, and why they cannot go on."""
        found: dict[str, RayError] = {}
        for client in clients:
            try:
                refuse_unknown_places([self.silos[client]] if client in self.silos else [])
                self.since.pop(client, None)
            except ResourcesError as refusal:
                if time.monotonic() - self.since.setdefault(client, time.monotonic()) >= AWAY_SECONDS:
                    error = ActorUnschedulableError(f"for {AWAY_SECONDS:g} s no node may read the silo of {client}")
                    error.__cause__ = refusal
                    found[client] = error
        return found

    def heard(self, client: str) -> None:
        """Count anew: the client has told something."""
        self.since.pop(client, None)
