"""The ensemble: clients are dealt to slots, each fits its expert; whoever stays away is named."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray.exceptions import RayError

from fedfactory_ray.classification.fitting import Epoch
from fedfactory_ray.cluster import Worker
from fedfactory_ray.config import Config
from fedfactory_ray.federation.client import ClientActor
from fedfactory_ray.federation.expert import Assignment, Expert, stored_expert
from fedfactory_ray.storage import Storage

ATTEMPTS = 3
Listener = Callable[[str, Epoch | Expert], None]


@dataclass(frozen=True)
class Experts:
    """The fitted experts by client, in order, and the reason for each that is missing."""

    fitted: dict[str, Expert]
    missing: dict[str, str]


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
    waiting = deque(a for a in assignments if a.client not in fitted)
    attempts = {a.client: 0 for a in waiting}
    missing: dict[str, str] = {}
    options = cast(Any, ClientActor).options(num_cpus=worker.num_cpus, num_gpus=worker.num_gpus)
    start = lambda: options.remote(config, worker.resources, storage)  # noqa: E731
    idle = [start() for _ in range(min(worker.slots, len(waiting)))]
    running: dict[Any, tuple[Assignment, Any]] = {}
    try:
        while waiting or running:
            while waiting and idle:
                assignment, actor = waiting.popleft(), idle.pop()
                attempts[assignment.client] += 1
                stream = actor.fit_expert.options(num_returns="streaming").remote(assignment)
                running[stream] = (assignment, actor)
            (stream, *_), _ = ray.wait(list(running), num_returns=1, fetch_local=False)
            assignment, actor = running[stream]
            client = assignment.client
            try:
                event = ray.get(next(stream))
                if isinstance(event, Expert):
                    fitted[client] = event
                listen(client, event)
            except StopIteration:
                del running[stream]
                idle.append(actor)
            except RayError as error:
                del running[stream]
                ray.kill(actor)  # where it lives: a failed process may be spoilt
                if client in fitted:
                    pass
                elif attempts[client] < ATTEMPTS:
                    waiting.append(assignment)
                else:
                    missing[client] = reason(error)
                if len(missing) == len(assignments):
                    raise
                if waiting:
                    idle.append(start())
    finally:
        for _, actor in running.values():
            ray.kill(actor)
    clients = [a.client for a in assignments]
    return Experts({c: fitted[c] for c in clients if c in fitted}, {c: missing[c] for c in clients if c in missing})


def reason(error: RayError) -> str:
    """One line that tells why an actor or its task failed."""
    cause = getattr(error, "cause", None) or error
    first, *_ = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {first}"
