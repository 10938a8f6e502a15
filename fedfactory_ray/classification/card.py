"""Cards of what is fitted: classifiers and experts, with the history of their fits. To look for one needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedfactory_ray.data.source import Task
from fedfactory_ray.storage.artefact import Artefact
from fedfactory_ray.storage.layout import classifier_folder, expert_folder


@dataclass(frozen=True)
class Epoch:
    """Progress of a fit; `real_*` tell of the real validation split, where the fit is judged on it."""

    epoch: int
    epochs: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float
    real_loss: float | None = None
    real_accuracy: float | None = None


@dataclass(frozen=True)
class Classifier(Artefact):
    """A fitted classifier, `name` in its run: the digest of the rows that it was fitted on, the epoch that validation
    images chose, and its accuracy on them."""

    kind: ClassVar[str] = "classifier"
    rows: str
    epoch: int
    validation_accuracy: float
    history: list[Epoch]
    task: Task
    model: str
    name: str = ""

    @property
    def folder(self) -> str:
        """See Artefact."""
        return classifier_folder(self.name)


@dataclass(frozen=True)
class Expert(Artefact):
    """A client's fitted expert: it saw `n_real` images of the client's own and `n_drawn` synthetic ones; the epoch that
    was chosen, and its accuracy on the images that validate."""

    kind: ClassVar[str] = "expert"
    renamed: ClassVar[dict[str, str]] = {"real": "n_real", "pool": "n_drawn"}
    client: str
    n_real: int
    n_drawn: int
    downlink_bytes: int
    epoch: int
    validation_accuracy: float
    history: tuple[Epoch, ...]

    @property
    def folder(self) -> str:
        """See Artefact."""
        return expert_folder(self.client)
