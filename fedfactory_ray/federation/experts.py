"""The experts: clients are dealt to slots, each fits its own; whoever stays away is named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError

from fedfactory_ray.classification.card import Epoch, Expert
from fedfactory_ray.cluster.failures import find_refusal, reason
from fedfactory_ray.cluster.plan import Worker
from fedfactory_ray.cluster.slots import Slots
from fedfactory_ray.cluster.stored import find_all
from fedfactory_ray.errors import GpuMemoryError
from fedfactory_ray.federation.client import start_client
from fedfactory_ray.federation.expert import Assignment
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.checkpoints import Checkpoints
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import checkpoints_folder, expert_folder

log = logging.getLogger(__name__)
Listener = Callable[[str, Epoch | Expert], None]


@dataclass(frozen=True)
class Experts:
    """The fitted experts by client, in order, and the reason for each that is missing."""

    fitted: dict[str, Expert]
    missing: dict[str, str]

    @property
    def folders(self) -> dict[str, str]:
        """Where each client's expert lies in a run's storage."""
        return {client: expert.folder for client, expert in self.fitted.items()}

    @property
    def downlink_bytes(self) -> int:
        """Bytes that the clients receive together."""
        return sum(expert.downlink_bytes for expert in self.fitted.values())


def collect_experts(
    config: Config, assignments: list[Assignment], worker: Worker, storage: Storage, listen: Listener
) -> Experts:
    """Have every client fit its expert, as many side by side as there are slots.

    An expert that is stored and verifies is not fitted again. A client whose actor dies or whose fit fails is given to
    a new actor, up to `resources.attempts` times; then its expert is missing. Raises the last failure where all are,
    and the first of a GPU without memory, which would come again.
    """
    wanted = {expert_folder(a.client): a.fingerprint(config) for a in assignments}
    fitted = {expert.client: expert for expert in find_all(storage, Expert, wanted).values()}
    if config.partition.scheme == "natural":  # earlier versions kept a silo's checkpoints here
        for folder in wanted:
            storage.delete_folder(checkpoints_folder(folder))
    for client, expert in fitted.items():
        folder = checkpoints_folder(expert.folder)
        Checkpoints(storage, folder, expert.fingerprint).delete()  # of a start that was killed at its very end
        listen(client, expert)
    todo = {a.client: a for a in assignments if a.client not in fitted}
    heard: set[str] = set()
    missing: dict[str, str] = {}

    def begin(actor: Any, client: str) -> Any:
        heard.discard(client)
        return actor.fit_expert.options(num_returns="streaming").remote(todo[client])

    def hear(client: str, event: Epoch | Expert, stream: Any) -> None:
        if isinstance(event, Expert):
            fitted[client] = event
        elif client not in heard and event.epoch > 1:
            log.info("expert of %s: goes on from epoch %d of %d", client, event.epoch - 1, event.epochs)
        heard.add(client)
        listen(client, event)

    def fail(client: str, error: RayError, last: bool) -> bool:
        if client in fitted:
            return False
        if isinstance(find_refusal(error), GpuMemoryError):
            raise error
        if last:
            missing[client] = reason(error)
        if len(missing) == len(assignments):
            raise error
        if last:
            log.warning("expert of %s is missing, the product is without it: %s", client, missing[client])
        return not last

    Slots(config, worker, lambda client: start_client(config, worker, storage, client)).serve(
        list(todo), begin, hear, fail
    )
    clients = [a.client for a in assignments]
    return Experts({c: fitted[c] for c in clients if c in fitted}, {c: missing[c] for c in clients if c in missing})
