"""The request: who asks which run to forget whom."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fedfactory_ray.errors import UnlearningError
from fedfactory_ray.settings.data import EXCLUDED, LONGEST_NAME, NAME
from fedfactory_ray.settings.names import allowed_name, is_folder_name

LONGEST_TOLD = 60


@dataclass(frozen=True)
class Request:
    """A request to make run `successor` of run `run`, without `exclude`: entries to be added to the run's own
    `partition.exclude`. `asked_at` is UTC, ISO 8601."""

    run: str
    exclude: tuple[str, ...]
    successor: str
    asked_by: str
    asked_at: str

    @classmethod
    def of(cls, tree: Any) -> Request:
        """A request that was stored as JSON. Raises UnlearningError for what is none: its names lead to folders."""
        try:
            request = cls(**tree | {"exclude": tuple(tree["exclude"])})
            texts = (request.run, request.successor, request.asked_by, request.asked_at, *request.exclude)
            sound = bool(request.exclude) and all(isinstance(text, str) for text in texts)
            sound = sound and all(re.fullmatch(EXCLUDED, entry) for entry in request.exclude)
            sound = sound and is_folder_name(request.run) and re.fullmatch(NAME, request.successor) is not None
        except (TypeError, KeyError):
            sound = False
        if not sound:
            raise UnlearningError(f"a damaged note of a request, {tree!r:.300}", "the note as it was written")
        return request

    @property
    def clients(self) -> list[str]:
        """The clients concerned."""
        return sorted({entry.partition("/")[0] for entry in self.exclude})

    def forgets(self, client: str, label: int) -> bool:
        """Whether a client's images of a class are to be forgotten."""
        return client in self.exclude or f"{client}/{label}" in self.exclude

    def asks(self, clients: Sequence[str], classes: Sequence[int]) -> bool:
        """Whether this is the request to forget these clients, or these classes of theirs."""
        parts = [int(entry.partition("/")[2]) for entry in self.exclude if "/" in entry]
        return set(self.clients) == set(clients) and set(parts) in (set(), set(classes))

    def same(self, other: Request) -> bool:
        """Whether both ask for the same, whoever asks and when."""
        return (self.run, self.exclude, self.successor) == (other.run, other.exclude, other.successor)


def make_request(
    run: str,
    held: Mapping[str, Sequence[int]],
    gone: Sequence[str],
    clients: Sequence[str],
    classes: Sequence[int],
    successor: str | None,
    asked_by: str,
) -> Request:
    """The request to forget `clients` of a run, or of each only `classes`; all of a client's classes are the client.

    `held` are the run's clients and the classes of each, `gone` its `partition.exclude`. The default successor's name
    tells what went. Raises UnlearningError for whom the run does not have, where nobody would be left, and for a
    successor that may not have its name.
    """
    if successor is not None and not re.fullmatch(NAME, successor):
        raise UnlearningError(
            f"--name {successor!r:.300}", f"letters, digits and ._- ({LONGEST_NAME} at most: it names a folder)"
        )
    if successor == run:
        raise UnlearningError(f"--name {successor}, the run itself", "the name of a new run")
    entries = []
    for client in sorted(set(clients)):
        if client in gone:
            raise UnlearningError(f"client {client} is already gone from run {run}", f"one of {', '.join(held)}")
        if client not in held:
            raise UnlearningError(f"run {run} has no client {client}", f"one of {', '.join(held)}")
        wrong = sorted(set(classes) - set(held[client]))
        if wrong:
            before = ", already gone" if any(f"{client}/{label}" in gone for label in wrong) else ""
            raise UnlearningError(
                f"client {client} holds no class {', '.join(map(str, wrong))} in run {run}{before}",
                f"of classes {', '.join(map(str, held[client]))}",
            )
        part = classes and set(classes) < set(held[client])
        entries += [f"{client}/{label}" for label in sorted(set(classes))] if part else [client]
    if all(client in entries for client in held):
        raise UnlearningError(f"run {run} would have no client left", "a run of at least one other client")
    told = "-".join(entry.replace("/", ".") for entry in entries)
    if len(told) > LONGEST_TOLD:
        told = f"{len(entries)}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
    if successor is None:
        successor = f"{allowed_name(run, otherwise='run')}-without-{told}"
        if len(successor) > LONGEST_NAME:
            successor = f"without-{told}-{hashlib.sha256(successor.encode()).hexdigest()[:8]}"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Request(run, tuple(sorted(entries)), successor, asked_by, now)
