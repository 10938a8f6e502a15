"""The round: clients are dealt to slots, their modules collected as references, each upload counted once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError

from fedfactory_ray.cluster import Worker
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


def stored_modules(storage: Storage, partition: Partition) -> dict[tuple[str, int], ModuleHandle]:
    """Modules of an earlier start that are there and verify; their weights are hashed in pieces, not held."""
    found = {}
    for client, label, indices in partition:
        folder = f"modules/{client}/class-{label:03d}"
        if storage.exists(f"{folder}/card.json") and storage.exists(f"{folder}/model.safetensors"):
            card = ModuleCard.from_json(storage.read(f"{folder}/card.json"))
            whole = storage.sha256(f"{folder}/model.safetensors") == card.sha256
            if whole and card.key == (client, label) and card.images == len(indices):
                found[card.key] = ModuleHandle(card)
    return found


def run_round(
    config: Config, partition: Partition, worker: Worker, storage: Storage, listen: Listener
) -> dict[tuple[str, int], ModuleHandle]:
    """Have every client train and upload its modules; returns a handle for each (client, class), in order.

    Clients wait for free slots, the longest training first. A client whose actor dies is given to a new actor,
    up to ATTEMPTS times; modules that it had uploaded stay. Errors of the client's own code are raised at once.
    """
    modules = stored_modules(storage, partition)
    todo: dict[str, dict[int, Any]] = {}
    for client, label, indices in partition:
        if (client, label) not in modules:
            todo.setdefault(client, {})[label] = indices
    work = {c: sum(config.generator.steps(len(i)) for i in share.values()) for c, share in todo.items()}
    waiting = deque(sorted(todo, key=lambda client: (-work[client], client)))
    options = cast(Any, ClientActor).options(num_cpus=worker.num_cpus, num_gpus=worker.num_gpus)
    start = lambda: options.remote(config, worker.resources, storage)  # noqa: E731
    idle = [start() for _ in range(min(worker.slots, len(waiting)))]
    running: dict[Any, tuple[str, Any]] = {}
    attempts = dict.fromkeys(todo, 0)
    try:
        while waiting or running:
            while waiting and idle:
                client, actor = waiting.popleft(), idle.pop()
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
                idle.append(actor)
            except (ActorDiedError, ActorUnavailableError):
                del running[stream]
                if attempts[client] == ATTEMPTS:
                    raise
                waiting.append(client)
                idle.append(start())
    finally:
        for _, actor in running.values():
            ray.kill(actor)
    return {(client, label): modules[client, label] for client, label, _ in partition}
