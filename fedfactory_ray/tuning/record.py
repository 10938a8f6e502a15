"""What is known of a trial: its reports as they came, and how it ended. The driver writes, a resumed trial reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import TRIAL

Outcome = Literal["whole", "stopped early", "failed"]


@dataclass(frozen=True)
class TrialStep:
    """A round or an epoch (`step`) of at most `steps`: accuracy and loss on validation images, `best` the highest
    accuracy so far, by which the scheduler decides. The report of a `whole` trial tells of what the method chose."""

    step: int
    steps: int
    accuracy: float
    loss: float
    best: float
    seconds: float
    whole: bool = False

    @classmethod
    def from_result(cls, result: Mapping[str, Any]) -> TrialStep:
        """The report inside what Ray Tune makes of it."""
        return cls(**{name: result[name] for name in cls.__dataclass_fields__})

    @property
    def merit(self) -> tuple[float, float]:
        """What trials are ranked by: accuracy, then loss."""
        return self.accuracy, -self.loss


@dataclass
class Record:
    """A trial's reports, in order, and its outcome: None while it runs, or where it broke off."""

    settings: Mapping[str, str]
    reports: list[TrialStep] = field(default_factory=list)
    outcome: Outcome | None = None

    @property
    def last(self) -> TrialStep | None:
        """The latest report."""
        return self.reports[-1] if self.reports else None

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.outcome in ("whole", "stopped early")

    @property
    def result(self) -> TrialStep | None:
        """What counts: the report of a whole trial, else the best one; None where none came."""
        if self.last is not None and self.last.whole:
            return self.last
        return max(self.reports, key=lambda report: report.merit, default=None)

    def add(self, report: TrialStep) -> bool:
        """Take a report unless an earlier start of the trial told it already; returns whether it is new."""
        last = self.last
        new = last is None or report.step > last.step or (report.whole and not last.whole)
        if new:
            self.reports.append(report)
        return new

    def write(self, storage: Storage) -> None:
        """Keep the record in a trial's storage."""
        storage.write_json(TRIAL, asdict(self))


def read_record(storage: Storage, settings: Mapping[str, str]) -> Record:
    """The record in a trial's storage, an empty one where there is none, or a damaged one: then it runs again."""
    found = storage.read_again(TRIAL, {})
    try:
        return Record(settings, [TrialStep(**report) for report in found["reports"]], found["outcome"])
    except (KeyError, TypeError):
        return Record(settings)
