"""The ensemble: clients are dealt to slots, each fits its expert; whoever stays away is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError

from fedfactory_ray.classification.fitting import Epoch
from fedfactory_ray.cluster.plan import Worker
from fedfactory_ray.cluster.slots import ATTEMPTS, Slots
from fedfactory_ray.federation.expert import Assignment, Expert, stored_expert
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.files import Storage

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


def fit_experts(
    config: Config, assignments: list[Assignment], worker: Worker, storage: Storage, listen: Listener
) -> Experts:
    """Have every client fit its expert, as many side by side as there are slots.

    An expert that is stored and verifies is not fitted again. A client whose actor dies or whose fit fails is given to
    a new actor, up to ATTEMPTS times; then its expert is missing. Raises the last failure where all are.
    """
    stored = {a.client: stored_expert(config, a, storage) for a in assignments}
    fitted = {client: expert for client, expert in stored.items() if expert is not None}
    for client, expert in fitted.items():
        listen(client, expert)
    todo = {a.client: a for a in assignments if a.client not in fitted}
    missing: dict[str, str] = {}

    def begin(actor: Any, client: str) -> Any:
        return actor.fit_expert.options(num_returns="streaming").remote(todo[client])

    def hear(client: str, event: Epoch | Expert, stream: Any) -> None:
        if isinstance(event, Expert):
            fitted[client] = event
        listen(client, event)

    def fail(client: str, error: RayError, attempts: int) -> bool:
        if client in fitted:
            return False
        if attempts == ATTEMPTS:
            missing[client] = reason(error)
        if len(missing) == len(assignments):
            raise error
        return attempts < ATTEMPTS

    Slots(config, worker, storage).serve(list(todo), begin, hear, fail)
    clients = [a.client for a in assignments]
    return Experts({c: fitted[c] for c in clients if c in fitted}, {c: missing[c] for c in clients if c in missing})


def reason(error: RayError) -> str:
    """One line that tells why an actor or its task failed."""
    cause = getattr(error, "cause", None) or error
    first, *_ = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {first}"
