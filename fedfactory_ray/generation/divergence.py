"""A training that diverged: the note that lies where a module would, in a federation that goes on without it."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from fedfactory_ray.generation.card import InModulesPlace
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import DIVERGED, MODULES


@dataclass(frozen=True)
class Divergence(InModulesPlace):
    """Why a client has no module of a class of which it holds `n_images`: its training diverged. An artefact without
    files, whose fingerprint and `canary` are those that the module would have: the same start finds it, and does not
    train what would diverge again."""

    kind: ClassVar[str] = "left-out module"
    why: Annotated[str, Field(max_length=1000)]
    canary: Annotated[str, Field(pattern=r"^[0-9a-f+]{0,8192}$")] = ""

    @staticmethod
    def mark(place: str) -> str:
        """See Kept."""
        return f"{place}/{DIVERGED}"

    def __str__(self) -> str:
        return f"{self.client}, class {self.label}: training diverged"


def read_divergences(storage: Storage) -> list[Divergence]:
    """What a run's storage notes of all modules that were left out, by client and class. Raises CardError."""
    places = [posixpath.dirname(name) for name in storage.names(MODULES) if posixpath.basename(name) == DIVERGED]
    return sorted((Divergence.read(storage, place) for place in places), key=lambda note: note.key)
