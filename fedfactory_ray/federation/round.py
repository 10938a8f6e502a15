"""The round: clients are dealt to slots, their modules collected as references, each upload counted once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError

from fedfactory_ray.cluster.absence import gather
from fedfactory_ray.cluster.plan import Worker, place, placement
from fedfactory_ray.cluster.slots import Slots
from fedfactory_ray.cluster.stored import find_all
from fedfactory_ray.data.partition import Partition
from fedfactory_ray.errors import TrainingDivergedError
from fedfactory_ray.federation.client import Progress, Upload, start_client
from fedfactory_ray.generation.card import ModuleCard, ModuleHandle, Modules, module_fingerprint
from fedfactory_ray.generation.divergence import Divergence
from fedfactory_ray.seeds import derive_seed
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import CHECKPOINTS, MODULES, checkpoints_folder, module_folder

log = logging.getLogger(__name__)
Listener = Callable[[Progress | Divergence | Upload], None]
N = TypeVar("N", ModuleCard, Divergence)


def stored_modules(config: Config, partition: Partition, worker: Worker, storage: Storage) -> Modules:
    """The modules of an earlier start, or kept of another run, that are what would be trained here and now."""
    there, found = set(storage.names(MODULES)), _stored(ModuleCard, config, partition, worker, storage)
    left = {name.rpartition(f"/{CHECKPOINTS}/")[0] for name in there} & {module_folder(c, y) for c, y, _ in partition}
    # Of a process that was killed at its very end; and earlier versions kept those of natural silos here.
    for folder in left if config.partition.scheme == "natural" else left & found.keys():
        storage.delete_folder(checkpoints_folder(folder))
    return {card.key: ModuleHandle(card) for card in found.values()}


def _stored(kind: type[N], config: Config, partition: Partition, worker: Worker, storage: Storage) -> dict[str, N]:
    """What lies in modules' folders, by folder, of those that would come of the trainings here and now."""
    there = set(storage.names(MODULES))
    keys = [(c, y) for c, y, _ in partition if kind.mark(module_folder(c, y)) in there]
    precisions = _precisions(config, worker, [client for client, _ in keys])
    wanted = {
        module_folder(client, label): module_fingerprint(
            config.generator,
            precision=precisions[place(config, client)],
            threads=config.resources.client.threads,
            seed=derive_seed(config.seed, "train", client, label),
            images_sha256=partition.images_sha256[client, label],
        )
        for client, label in keys
    }
    return find_all(storage, kind, wanted)


def _precisions(config: Config, worker: Worker, clients: list[str]) -> dict[str, str]:
    """By place of these clients, the arithmetic that `generator.precision` comes to there."""
    precision = config.generator.precision
    places = {place(config, client): client for client in clients}
    if precision != "auto":
        return dict.fromkeys(places, precision)
    asked = [_auto.options(**worker.options, **placement(config, client)).remote() for client in places.values()]
    return dict(zip(places, gather(dict(zip(asked, places.values(), strict=True)), config), strict=True))


@ray.remote
def _auto() -> str:
    from fedfactory_ray.cluster.devices import assigned_device, resolve_precision

    return resolve_precision("auto", assigned_device(ray.get_gpu_ids()))


def run_round(config: Config, partition: Partition, worker: Worker, storage: Storage, listen: Listener) -> Modules:
    """Have every client train and upload its modules; returns a handle for each (client, class), in order.

    Clients wait for free slots, the longest training first. A client whose actor or node dies is given to another
    actor, up to `resources.attempts` times, and goes on from its last module and checkpoint. Errors of the client's own
    code are raised at once; but a module whose training diverges is left out where `resources.on_divergence` says so.
    Raises TrainingDivergedError where none is left.
    """
    modules = stored_modules(config, partition, worker, storage)
    left_out: dict[tuple[str, int], Divergence] = {}
    if config.resources.on_divergence == "leave_out":
        left_out = {note.key: note for note in _stored(Divergence, config, partition, worker, storage).values()}
    todo: dict[str, dict[int, Any]] = {}
    for client, label, indices in partition:
        if (client, label) not in modules.keys() | left_out.keys():
            todo.setdefault(client, {})[label] = indices
    work = {c: sum(config.generator.steps(len(i)) for i in share.values()) for c, share in todo.items()}

    def begin(actor: Any, client: str) -> Any:
        return actor.train.options(num_returns="streaming").remote(client, todo[client])

    def hear(client: str, event: Progress | Upload, stream: Any) -> None:
        if isinstance(event, Upload):
            modules[event.card.key] = ModuleHandle(event.card, next(stream, None))
            del todo[client][event.card.label]
        elif isinstance(event, Divergence):
            left_out[event.key] = event
            del todo[client][event.label]
        elif event.resumed:
            log.info("%s, class %d: goes on from step %d of %d", client, event.label, event.step, event.steps)
            return
        listen(event)

    def fail(client: str, error: RayError, last: bool) -> bool:
        if last or not isinstance(error, RayActorError | ObjectLostError):
            raise error
        return bool(todo[client])

    order = sorted(todo, key=lambda client: (-work[client], client))
    Slots(config, worker, lambda client: start_client(config, worker, storage, client)).serve(order, begin, hear, fail)
    for note in left_out.values():
        log.warning("left out: %s (%s)", note, note.why)
    if not modules:
        raise TrainingDivergedError("every client's, of every class", next(iter(left_out.values())).why)
    return {(client, label): modules[client, label] for client, label, _ in partition if (client, label) in modules}
