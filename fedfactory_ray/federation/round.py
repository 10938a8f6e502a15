"""The round: clients are dealt to slots, their modules collected as references, each upload counted once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError, RayError

from fedfactory_ray.cluster.plan import Worker
from fedfactory_ray.cluster.slots import ATTEMPTS, Slots
from fedfactory_ray.data.partition import Partition
from fedfactory_ray.federation.client import Progress, Upload
from fedfactory_ray.generation.card import ModuleCard, ModuleHandle
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.files import Storage

Listener = Callable[[Progress | Upload], None]


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

    def begin(actor: Any, client: str) -> Any:
        return actor.train.options(num_returns="streaming").remote(client, todo[client])

    def hear(client: str, event: Progress | Upload, stream: Any) -> None:
        if isinstance(event, Upload):
            modules[event.card.key] = ModuleHandle(event.card, next(stream, None))
            del todo[client][event.card.label]
        listen(event)

    def fail(client: str, error: RayError, attempts: int) -> bool:
        if attempts == ATTEMPTS or not isinstance(error, RayActorError | ObjectLostError):
            raise error
        for label, indices in list(todo[client].items()):
            handle = stored_module(storage, client, label, len(indices))
            if handle is not None:
                modules[handle.card.key] = handle
                del todo[client][label]
        return bool(todo[client])

    order = sorted(todo, key=lambda client: (-work[client], client))
    Slots(config, worker, storage).serve(order, begin, hear, fail)
    return {(client, label): modules[client, label] for client, label, _ in partition}
