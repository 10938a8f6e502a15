"""Absence: natural silos whose nodes are gone. Ray would wait for them for ever."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ray

from fedfactory_ray.cluster.plan import refuse_unknown_places
from fedfactory_ray.errors import ResourcesError
from fedfactory_ray.settings.config import Config

LOOK_SECONDS = 1.0
"""How often it is looked whether a client's task failed, or its silo is away, while others are at work."""


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


def replies_of(asked: Mapping[Any, str], config: Config) -> Iterator[Any]:
    """The values of the references `asked`, as they come; each is given by a client.

    Raises what a client's task raised, or ResourcesError when the silo of one that has not replied stays away.
    """
    waiting, away = list(asked), Absence(config)
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=LOOK_SECONDS, fetch_local=False)
        yield from ray.get(ready)
        for refusal in away.given_up(asked[reference] for reference in waiting).values():
            raise refusal


def gather(asked: Mapping[Any, str], config: Config) -> list[Any]:
    """All values of the references `asked`, in their order; see `replies_of`."""
    for _ in replies_of(asked, config):
        pass
    return list(ray.get(list(asked)))
