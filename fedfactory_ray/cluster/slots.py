"""Slots: actors that serve client after client, as many side by side as the cluster has room for."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, RayError

from fedfactory_ray.cluster.absence import Absence
from fedfactory_ray.cluster.failures import reason
from fedfactory_ray.cluster.plan import Worker, place
from fedfactory_ray.settings.config import Config

log = logging.getLogger(__name__)


class Slots:
    """The actors: each serves clients of its own place, and goes when nobody waits for that place."""

    def __init__(self, config: Config, worker: Worker, start: Callable[[str], Any]) -> None:
        """`start(client)` starts an actor where that client's images may be read."""
        self.config, self.start = config, start
        self.idle: dict[str, list[Any]] = {}
        self.count = 0
        self.absence = Absence(config)
        # Natural silos wait for their own nodes, so none may wait for another's slot.
        self.limit = len(config.partition.silos) or worker.slots

    def serve(
        self,
        clients: list[str],
        begin: Callable[[Any, str], Any],
        hear: Callable[[str, Any, Any], None],
        fail: Callable[[str, RayError, bool], bool],
    ) -> None:
        """Serve `clients` in this order, as slots come free.

        `begin(actor, client)` starts the client's stream; `hear(client, event, stream)` takes each of its events;
        `fail(client, error, last)` returns True to retry on another actor. After the `last` of `resources.attempts`
        nothing is retried; a silo that stays away is never retried.
        """
        waiting: dict[str, deque[str]] = {}
        """By place; so that an event costs no look at all who wait."""
        for client in clients:
            waiting.setdefault(place(self.config, client), deque()).append(client)
        attempts = dict.fromkeys(clients, 0)
        running: dict[Any, tuple[str, Any]] = {}
        most, patience = self.config.resources.attempts, self.config.resources.away_seconds
        try:
            while waiting or running:
                self._keep_places(waiting)
                for where, queue in list(waiting.items()):
                    while queue and (actor := self._take(where, queue[0])) is not None:
                        client = queue.popleft()
                        attempts[client] += 1
                        running[begin(actor, client)] = (client, actor)
                    if not queue:
                        del waiting[where]
                ready, _ = ray.wait(list(running), num_returns=1, timeout=patience / 10, fetch_local=False)
                if not ready:
                    away = self.absence.given_up(client for client, _ in running.values())
                    for stream in [stream for stream, (client, _) in running.items() if client in away]:
                        client, actor = running.pop(stream)
                        self._stop(actor)
                        error = ActorUnschedulableError(f"for {patience:g} s no node may read the silo of {client}")
                        error.__cause__ = away[client]
                        fail(client, error, True)
                    continue
                (stream,) = ready
                client, actor = running[stream]
                self.absence.heard(client)
                try:
                    hear(client, ray.get(next(stream)), stream)
                except StopIteration:
                    del running[stream]
                    self.idle.setdefault(place(self.config, client), []).append(actor)
                except RayError as error:
                    del running[stream]
                    self._stop(actor)
                    last = attempts[client] == most
                    if fail(client, error, last) and not last:
                        why = reason(error)
                        log.warning("%s is tried again, attempt %d of %d: %s", client, attempts[client] + 1, most, why)
                        waiting.setdefault(place(self.config, client), deque()).append(client)
        finally:
            for _, actor in running.values():
                ray.kill(actor)
            self._keep_places([])

    def _take(self, where: str, client: str) -> Any | None:
        """An actor for `client` at its place, or None while all slots are taken."""
        idle = self.idle.get(where)
        if idle:
            return idle.pop()
        if self.count == self.limit:
            return None
        self.count += 1
        return self.start(client)

    def _stop(self, actor: Any) -> None:
        """End an actor, so that what it held goes to those that wait for room (a dead node's slot may never return)."""
        ray.kill(actor)
        self.count -= 1

    def _keep_places(self, places: Collection[str]) -> None:
        """End the idle actors of all other places."""
        for left in set(self.idle).difference(places):
            for actor in self.idle.pop(left):
                self._stop(actor)
