"""Cards of the baselines: federated methods with the history of their rounds, and classifiers of lone clients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from fedfactory_ray.data.source import Task
from fedfactory_ray.storage.artefact import Artefact
from fedfactory_ray.storage.layout import classifier_folder, lone_classifier


@dataclass(frozen=True)
class Round:
    """One round: losses and accuracy are means over images, balanced accuracy over classes, with the classes alike (NaN
    where an earlier version told none); bytes are those of all messages."""

    round: int
    clients: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float
    bytes_up: int
    bytes_down: int
    seconds: float
    validation_balanced: float = math.nan

    @property
    def merit(self) -> tuple[float, float]:
        """What the choice of the round goes by: balanced validation accuracy, then loss."""
        return self.validation_balanced, -self.validation_loss

    @property
    def diverged(self) -> bool:
        """Whether the server's weights stopped being finite."""
        return not math.isfinite(self.validation_loss)


@dataclass(frozen=True)
class Federated(Artefact):
    """A finished method and its classifier: what it was, the round that was chosen (0: none was better), all rounds."""

    kind: ClassVar[str] = "federated method"
    method: dict[str, Any]
    settings: dict[str, Any]
    task: Task
    chosen: int
    history: list[Round]
    name: str = ""

    @property
    def folder(self) -> str:
        """See Artefact."""
        return classifier_folder(self.name)


@dataclass(frozen=True)
class Alone(Artefact):
    """A client's own classifier: the epoch that was chosen, of so many."""

    kind: ClassVar[str] = "lone classifier"
    epoch: int
    epochs: int
    client: str = ""

    @property
    def folder(self) -> str:
        """See Artefact."""
        return classifier_folder(lone_classifier(self.client))
