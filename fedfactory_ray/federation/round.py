"""The round: clients are dealt to slots, their modules collected as references, each upload counted once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError

from fedfactory_ray.cluster import Worker, placement
from fedfactory_ray.config import Config
from fedfactory_ray.data.partition import Partition
from fedfactory_ray.federation.client import ClientActor, Progress, Upload
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.storage import Storage

ATTEMPTS = 3
Listener = Callable[[Progress | Upload], None]


@dataclass(frozen=True)
class ModuleHandle:
    """A module by its card; the weights lie in the object store (`ref`) and in storage, never here."""

    card: ModuleCard
    ref: ray.ObjectRef | None = field(default=None, compare=False)


def stored_module(storage: Storage, client: str, label: int, images: int) -> ModuleHandle | None:
    """A module that is there already and verifies; its weights are hashed in pieces, not held."""
    folder = f"modules/{client}/class-{label:03d}"
    if not storage.exists(f"{folder}/card.json") or not storage.exists(f"{folder}/model.safetensors"):
        return None
    card = ModuleCard.from_json(storage.read(f"{folder}/card.json"))
    whole = storage.sha256(f"{folder}/model.safetensors") == card.sha256
    return ModuleHandle(card) if whole and card.key == (client, label) and card.images == images else None


def stored_modules(storage: Storage, partition: Partition) -> dict[tuple[str, int], ModuleHandle]:
    """The modules of an earlier start of the run."""
    found = ((c, y, stored_module(storage, c, y, len(indices))) for c, y, indices in partition)
    return {(client, label): handle for client, label, handle in found if handle is not None}


class Slots:
    """Client actors: each serves client after client of its place, and goes when nobody waits for that place."""

    def __init__(self, config: Config, worker: Worker, storage: Storage) -> None:
        self.config, self.worker, self.storage = config, worker, storage
        self.idle: dict[str, list[Any]] = {}
        self.count = 0
        # Natural silos wait for their own nodes, so none may wait for another's slot.
        self.limit = len(config.partition.silos) or worker.slots

    def place(self, client: str) -> str:
        """Clients of the same place may use the same actor."""
        return json.dumps(placement(self.config, client), sort_keys=True)

    def take(self, client: str) -> Any | None:
        """An actor for `client`, or None while all slots are taken."""
        waiting = self.idle.get(self.place(client))
        if waiting:
            return waiting.pop()
        if self.count == self.limit:
            return None
        self.count += 1
        demands = {"num_cpus": self.worker.num_cpus, "num_gpus": self.worker.num_gpus}
        options = cast(Any, ClientActor).options(**demands, **placement(self.config, client))
        return options.remote(self.config, self.worker.resources, self.storage)

    def give_back(self, client: str, actor: Any) -> None:
        """An actor whose client is served."""
        self.idle.setdefault(self.place(client), []).append(actor)

    def stop(self, actor: Any) -> None:
        """End an actor, so that what it held goes to others."""
        ray.kill(actor)
        self.count -= 1

    def keep_places(self, places: set[str]) -> None:
        """End the idle actors of all other places."""
        for place in set(self.idle) - places:
            for actor in self.idle.pop(place):
                self.stop(actor)


def run_round(
    config: Config, partition: Partition, worker: Worker, storage: Storage, listen: Listener
) -> dict[tuple[str, int], ModuleHandle]:
    """Have every client train and upload its modules; returns a handle for each (client, class), in order.

    Clients wait for free slots, the longest training first. A client whose actor or node dies is given to another
    actor, up to ATTEMPTS times, and goes on from its last module and checkpoint. Errors of the client's own code are
    raised at once.
    """
    modules = stored_modules(storage, partition)
    todo: dict[str, dict[int, Any]] = {}
    for client, label, indices in partition:
        if (client, label) not in modules:
            todo.setdefault(client, {})[label] = indices
    work = {c: sum(config.generator.steps(len(i)) for i in share.values()) for c, share in todo.items()}
    waiting = sorted(todo, key=lambda client: (-work[client], client))
    slots = Slots(config, worker, storage)
    running: dict[Any, tuple[str, Any]] = {}
    attempts = dict.fromkeys(todo, 0)
    try:
        while waiting or running:
            slots.keep_places({slots.place(client) for client in waiting})
            for client in list(waiting):
                actor = slots.take(client)
                if actor is not None:
                    waiting.remove(client)
                    attempts[client] += 1
                    stream = actor.train.options(num_returns="streaming").remote(client, todo[client])
                    running[stream] = (client, actor)
            (stream, *_), _ = ray.wait(list(running), num_returns=1, fetch_local=False)
            client, actor = running[stream]
            try:
                event = ray.get(next(stream))
                if isinstance(event, Upload):
                    modules[event.card.key] = ModuleHandle(event.card, next(stream))
                    del todo[client][event.card.label]
                listen(event)
            except StopIteration:
                del running[stream]
                slots.give_back(client, actor)
            except (ActorDiedError, ActorUnavailableError, ObjectLostError):
                del running[stream]
                slots.stop(actor)
                if attempts[client] == ATTEMPTS:
                    raise
                for label, indices in list(todo[client].items()):
                    handle = stored_module(storage, client, label, len(indices))
                    if handle is not None:
                        modules[handle.card.key] = handle
                        del todo[client][label]
                if todo[client]:
                    waiting.append(client)
    finally:
        for _, actor in running.values():
            ray.kill(actor)
    return {(client, label): modules[client, label] for client, label, _ in partition}
