"""Slots: client actors that serve client after client, as many side by side as the cluster has room for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

import ray
from ray.exceptions import ActorUnschedulableError, RayError

from fedfactory_ray.cluster import Worker, place, placement, refuse_unknown_places
from fedfactory_ray.config import Config
from fedfactory_ray.errors import ResourcesError
from fedfactory_ray.federation.client import ClientActor
from fedfactory_ray.storage import Storage

ATTEMPTS = 3
AWAY_SECONDS = 600.0
"""A natural silo whose nodes are gone for so long, while nobody else has anything to tell, is given up; Ray itself
would wait for ever."""


class Slots:
    """The actors: each serves clients of its own place, and goes when nobody waits for that place."""

    def __init__(self, config: Config, worker: Worker, storage: Storage) -> None:
        self.config, self.worker, self.storage = config, worker, storage
        self.idle: dict[str, list[Any]] = {}
        self.count = 0
        self.away: dict[str, float] = {}
        # Natural silos wait for their own nodes, so none may wait for another's slot.
        self.limit = len(config.partition.silos) or worker.slots

    def serve(
        self,
        clients: list[str],
        begin: Callable[[Any, str], Any],
        hear: Callable[[str, Any, Any], None],
        fail: Callable[[str, RayError, int], bool],
    ) -> None:
        """Serve `clients` in this order, as slots come free.

        `begin(actor, client)` starts the client's stream; `hear(client, event, stream)` takes each of its events;
        `fail(client, error, attempts)` tells whether a client whose stream broke off is given to another actor; that of
        a silo which stays away counts as the last attempt.
        """
        waiting, attempts = list(clients), dict.fromkeys(clients, 0)
        running: dict[Any, tuple[str, Any]] = {}
        try:
            while waiting or running:
                self._keep_places({place(self.config, client) for client in waiting})
                for client in list(waiting):
                    actor = self._take(client)
                    if actor is not None:
                        waiting.remove(client)
                        attempts[client] += 1
                        running[begin(actor, client)] = (client, actor)
                ready, _ = ray.wait(list(running), num_returns=1, timeout=AWAY_SECONDS / 10, fetch_local=False)
                if not ready:
                    for stream, error in self._away(running):
                        client, actor = running.pop(stream)
                        self._stop(actor)
                        fail(client, error, ATTEMPTS)
                    continue
                (stream,) = ready
                client, actor = running[stream]
                self.away.pop(client, None)
                try:
                    hear(client, ray.get(next(stream)), stream)
                except StopIteration:
                    del running[stream]
                    self.idle.setdefault(place(self.config, client), []).append(actor)
                except RayError as error:
                    del running[stream]
                    self._stop(actor)
                    if fail(client, error, attempts[client]):
                        waiting.append(client)
        finally:
            for _, actor in running.values():
                ray.kill(actor)
            self._keep_places(set())

    def _take(self, client: str) -> Any | None:
        """An actor for `client`, or None while all slots are taken."""
        idle = self.idle.get(place(self.config, client))
        if idle:
            return idle.pop()
        if self.count == self.limit:
            return None
        self.count += 1
        demands = {"num_cpus": self.worker.num_cpus, "num_gpus": self.worker.num_gpus}
        options = cast(Any, ClientActor).options(**demands, **placement(self.config, client))
        return options.remote(self.config, self.worker.resources, self.storage)

    def _away(self, running: dict[Any, tuple[str, Any]]) -> list[tuple[Any, RayError]]:
        """The streams whose clients' silos have had no node for too long, and why they cannot go on."""
        found = []
        for stream, (client, _) in running.items():
            try:
                refuse_unknown_places([silo for silo in self.config.partition.silos if silo.name == client])
                self.away.pop(client, None)
            except ResourcesError as refusal:
                if time.monotonic() - self.away.setdefault(client, time.monotonic()) >= AWAY_SECONDS:
                    error = ActorUnschedulableError(f"for {AWAY_SECONDS:g} s no node may read the silo of {client}")
                    error.__cause__ = refusal
                    found.append((stream, error))
        return found

    def _stop(self, actor: Any) -> None:
        """End an actor, so that what it held goes to those that wait for room (a dead node's slot may never return)."""
        ray.kill(actor)
        self.count -= 1

    def _keep_places(self, places: set[str]) -> None:
        """End the idle actors of all other places."""
        for left in set(self.idle) - places:
            for actor in self.idle.pop(left):
                self._stop(actor)
