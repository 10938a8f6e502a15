"""The table of a study: every trial with its settings, the best first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import StringIO

from rich.console import Console

from fedfactory_ray.storage.layout import BEST_CONFIG
from fedfactory_ray.tracking.runs import Run
from fedfactory_ray.tracking.table import PlainTable
from fedfactory_ray.tuning.record import Outcome, Record
from fedfactory_ray.tuning.search import overrides


@dataclass(frozen=True)
class TrialLine:
    """A trial: its settings, accuracy and loss on validation images (None: it failed), the step that it came to, of at
    most `steps`, and its seconds."""

    settings: Mapping[str, str]
    accuracy: float | None
    loss: float | None
    step: int
    steps: int
    seconds: float
    outcome: Outcome | None

    @classmethod
    def of(cls, record: Record) -> TrialLine:
        """The line of a record."""
        result, last = record.result, record.last
        if result is None or last is None:
            return cls(record.settings, None, None, 0, 0, 0.0, record.outcome)
        return cls(record.settings, result.accuracy, result.loss, last.step, last.steps, last.seconds, record.outcome)

    @property
    def rank(self) -> tuple[int, float, float]:
        """Place in the table: by accuracy, then loss; whole trials first, failed ones at the end.

        A trial that was stopped shows the best of its steps, which a whole one's choice of step may miss.
        """
        if self.outcome == "failed" or self.accuracy is None or self.loss is None:
            return 2, 0.0, 0.0
        return int(self.outcome != "whole"), -self.accuracy, math.inf if math.isnan(self.loss) else self.loss


@dataclass(frozen=True)
class Study:
    """A finished study, its lines from the best to the poorest."""

    name: str
    storage: str
    method: str
    unit: str
    lines: list[TrialLine]

    @property
    def best(self) -> str:
        """The best settings as arguments of a job's command line."""
        return overrides(self.lines[0].settings)


def study_table(study: Study) -> PlainTable:
    """The table at the end."""
    table = PlainTable(title=f"{study.name}, best first", title_justify="left")
    fields = list(study.lines[0].settings)
    short = [name.rpartition(".")[2] for name in fields]
    for name in short if len(set(short)) == len(short) else fields:
        table.add_column(name, justify="right", overflow="fold")
    for name in ("validation accuracy", "loss", study.unit, "seconds", ""):
        table.add_column(name, justify="right", overflow="fold")
    for line in study.lines:
        scores = ("–" if score is None else f"{score:.4f}" for score in (line.accuracy, line.loss))
        costs = (f"{line.step} of {line.steps}", f"{line.seconds:.0f}")
        table.add_row(*line.settings.values(), *scores, *costs, str(line.outcome))
    return table


def log_study(run: Run, study: Study, best: str) -> None:
    """Log table, lines and the best configuration (YAML) to the study's MLflow run."""
    text = StringIO()
    Console(file=text, width=160).print(study_table(study))
    run.text(text.getvalue(), "trials.txt")
    run.json([asdict(line) for line in study.lines], "trials.json")
    run.text(best, BEST_CONFIG)
    run.tag("best", study.best)
    if study.lines[0].accuracy is not None:
        run.metrics({"accuracy": study.lines[0].accuracy})
