"""Checkpoints: where a piece of work stood, so that it goes on from there after it broke off."""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fedfactory_ray.errors import StorageError
from fedfactory_ray.storage.artefact import Artefact, find, keep
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import CARD, checkpoint_folder


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Artefact):
    """Where the work of a fingerprint stood after `step`; `state` holds JSON values."""

    kind: ClassVar[str] = "checkpoint"
    place: str
    step: int
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """See Artefact."""
        return self.place


def scratch_of(run: Storage, folder: str) -> Storage:
    """Where this node keeps the checkpoints of a run that may not leave it: below its `folder`, for its user alone.
    Raises StorageError where it may not be written."""
    place = os.path.expanduser(folder)
    try:
        os.makedirs(place, mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageError(place, str(error), "storage.scratch with a folder of the node's own") from error
    return Storage(place).within(hashlib.sha256(run.uri.encode()).hexdigest()[:16])


class Checkpoints:
    """The checkpoints of the work that `fingerprint` determines, below `folder`; the newest whole one counts."""

    def __init__(self, storage: Storage, folder: str, fingerprint: str) -> None:
        self.storage, self.every, self.fingerprint = storage, folder, fingerprint
        self.folder = f"{folder}/{fingerprint[:16]}"

    def file(self, step: int, name: str) -> str:
        """Where a file of the checkpoint after `step` lies."""
        return f"{checkpoint_folder(self.folder, step)}/{name}"

    def save(self, step: int, files: Mapping[str, bytes], state: Mapping[str, Any] | None = None) -> None:
        """Keep files and state, and no older ones."""
        digests = {name: self.storage.write(self.file(step, name), content) for name, content in files.items()}
        self.seal(step, digests, state)

    def seal(self, step: int, digests: Mapping[str, str], state: Mapping[str, Any] | None = None) -> None:
        """Make a checkpoint of files that are written, wherever they were; `digests` has their SHA-256 by name."""
        place = checkpoint_folder(self.folder, step)
        keep(
            self.storage,
            Checkpoint(
                fingerprint=self.fingerprint, files=dict(digests), place=place, step=step, state=dict(state or {})
            ),
        )
        for older in self._places():
            if older != place:
                self.storage.delete_folder(older)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole."""
        found = (find(self.storage, Checkpoint, place, self.fingerprint) for place in reversed(self._places()))
        return next((checkpoint for checkpoint in found if checkpoint is not None), None)

    def read(self, checkpoint: Checkpoint, name: str) -> bytes:
        """Content of one of its files."""
        return self.storage.read(f"{checkpoint.folder}/{name}")

    def delete(self) -> None:
        """Delete them all, and those of the same work with other settings that was given up."""
        self.storage.delete_folder(self.every)

    def _places(self) -> list[str]:
        """Folders with a card, the oldest first."""
        return [posixpath.dirname(name) for name in self.storage.names(self.folder) if name.endswith(f"/{CARD}")]
