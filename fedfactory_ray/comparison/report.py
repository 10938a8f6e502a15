"""What a comparison tells: lines of a table, a plot, and both in storage and MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.text import Text

from fedfactory_ray.classification import intervals
from fedfactory_ray.classification.evaluation import Difference
from fedfactory_ray.classification.intervals import SAMPLING
from fedfactory_ray.classification.rules import ALIKE, ANNOUNCED
from fedfactory_ray.storage.layout import CENTRALISED, METHOD, PLOT, TABLE
from fedfactory_ray.tracking import plots
from fedfactory_ray.tracking.runs import Run
from fedfactory_ray.tracking.table import PlainTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FACTORY, FACTORY_II = METHOD, f"{METHOD}-ii"
ENSEMBLE, MEAN, BEST = "local, ensemble", "local, mean", "local, best on test"
LONE = f"{FACTORY_II}, lone experts, mean"
ACCURACY, BALANCED, AUROC = f"{ANNOUNCED}/accuracy", f"{ALIKE}/balanced_accuracy", f"{ALIKE}/auroc"
NLL, ECE = f"{ANNOUNCED}/nll", f"{ANNOUNCED}/ece"
COMPARED = (ACCURACY, BALANCED, AUROC, NLL, ECE)
"""Scores of the table, each of one rule."""
PAIRS = ((FACTORY, CENTRALISED), (FACTORY_II, CENTRALISED), (FACTORY_II, FACTORY))
"""Methods of which the first's gain on the second is told."""


@dataclass(frozen=True)
class MethodLine:
    """A line of the table. `scores` are an evaluation's scalars; over seeds, of those that are compared the means, with
    `<score>_low`, `<score>_high` (95 % interval) and `<score>_std`.

    Bytes are those of all clients together, until the method's last round.
    """

    method: str
    scores: dict[str, float]
    rounds: float | None
    bytes_up: float
    bytes_down: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """What a comparison on one seed, or over several, tells; `curves` are validation accuracies by round. Architecture
    II's line is without the experts of the clients `missing`; both of the factory's are without the modules `left_out`,
    a text each; methods that `diverged` at once are untrained; `gained`
    tells, by "first less second", what a method gains on another. All intervals cover the sampling of test images only
    where `seeds` is 1, else the variation over seeds: partitions and fits, on the same test images."""

    name: str
    storage: str
    lines: list[MethodLine]
    curves: dict[str, list[float]]
    missing: tuple[str, ...] = ()
    diverged: tuple[str, ...] = ()
    gained: dict[str, Difference] = field(default_factory=dict)
    seeds: int = 1
    left_out: tuple[str, ...] = ()

    @property
    def intervals(self) -> str:
        """What the intervals cover."""
        return f"over {self.seeds} seeds, fits included, same test images" if self.seeds > 1 else SAMPLING

    def to_json(self) -> dict[str, Any]:
        """For storage and MLflow; all but the curves."""
        return {
            "lines": [vars(line) for line in self.lines],
            "missing": self.missing,
            "diverged": self.diverged,
            "left_out": self.left_out,
            "gained": {name: each.scalars() for name, each in self.gained.items()},
            "intervals": self.intervals,
        }


HEADERS = (
    *("method", "accuracy\nprior", "balanced\nalike", "AUROC\nalike", "NLL · ECE\nprior"),
    *("rounds", "MB up", "MB down", "seconds"),
)
"""Of the table; below the figure, the rule that it is told by."""
NOTE = "prior: with the one that the clients' counts announce; alike: with the classes alike"


def over_seeds(found: Sequence[Comparison]) -> Comparison:
    """Means over seeds, with their intervals and standard deviations (n - 1)."""
    lines = []
    for same in zip(*(comparison.lines for comparison in found), strict=True):
        scores: dict[str, float] = {}
        for score in COMPARED:
            values = [line.scores[score] for line in same]
            told = intervals.over_seeds(values)
            scores |= {score: told.value, f"{score}_low": told.low, f"{score}_high": told.high}
            scores[f"{score}_std"] = float(np.std(values, ddof=1))
        lines.append(
            MethodLine(
                same[0].method,
                scores,
                None if same[0].rounds is None else float(np.mean([line.rounds for line in same])),
                *(float(np.mean([getattr(line, k) for line in same])) for k in ("bytes_up", "bytes_down", "seconds")),
            )
        )
    name = f"{found[0].name}-and-{len(found) - 1}-more-seeds"
    missing, diverged, left_out = (
        tuple(f"{one} ({comparison.name})" for comparison in found for one in getattr(comparison, kind))
        for kind in ("missing", "diverged", "left_out")
    )
    gained = {
        pair: Difference(
            *(
                intervals.over_seeds([getattr(comparison.gained[pair], figure).value for comparison in found])
                for figure in ("accuracy", "balanced_accuracy")
            )
        )
        for pair in found[0].gained
    }
    several = len(found)
    return Comparison(name, found[0].storage, lines, found[0].curves, missing, diverged, gained, several, left_out)


def score_text(scores: dict[str, float], score: str) -> str:
    """A score with its interval, where it has one."""
    value, low, high = (scores.get(f"{score}{ending}") for ending in ("", "_low", "_high"))
    return f"{value:.4f}" if low is None else f"{value:.4f} [{low:.4f}, {high:.4f}]"


def comparison_table(comparison: Comparison) -> PlainTable:
    """The table at the end."""
    table = PlainTable(title=f"comparison · {comparison.name}", title_justify="left")
    for column in HEADERS:
        room = 8 if column in HEADERS[1:3] else None  # of a figure with its bracket
        table.add_column(column, justify="left" if column == "method" else "right", overflow="fold", min_width=room)
    for line in comparison.lines:
        table.add_row(
            line.method,
            *(score_text(line.scores, score) for score in (ACCURACY, BALANCED)),
            f"{line.scores[AUROC]:.4f}",
            " · ".join(f"{line.scores[score]:.4f}" for score in (NLL, ECE)),
            "–" if line.rounds is None else f"{line.rounds:g}",
            f"{line.bytes_up / 1e6:.2f}",
            f"{line.bytes_down / 1e6:.2f}",
            f"{line.seconds:.0f}",
        )
    notes = [NOTE, f"95 % intervals: {comparison.intervals}"]
    if comparison.missing:
        notes.append(f"{FACTORY_II} is without the experts of {', '.join(comparison.missing)}")
    notes += [f"left out: {each}" for each in comparison.left_out]
    if comparison.diverged:
        notes.append(f"diverged at once, shown untrained: {', '.join(comparison.diverged)}")
    for pair, gain in comparison.gained.items():
        notes.append(f"{pair}, paired: accuracy {gain.accuracy.signed}")
        notes.append(f"balanced accuracy {gain.balanced_accuracy.signed}")
    table.caption = Text("\n".join(notes), "table.caption")
    return table


def draw(comparison: Comparison) -> Figure:
    """The plot: a bar a method, and the federated ones' validation accuracy by round."""
    return plots.comparison_plot({line.method: line.scores for line in comparison.lines}, comparison.curves)


def log_comparison(run: Run, runs: dict[str, Run], comparison: Comparison) -> None:
    """Log table and plot to `run`, and each method's line to its own run of `runs`, which end."""
    for line in comparison.lines:
        if line.method in runs:
            costs = {"rounds": line.rounds or 0, "bytes_up": line.bytes_up, "bytes_down": line.bytes_down}
            runs[line.method].metrics(line.scores | costs | {"seconds": line.seconds})
    for child in {id(child): child for child in runs.values()}.values():
        child.end()
    text = StringIO()
    Console(file=text, width=160).print(comparison_table(comparison))
    run.text(text.getvalue(), "comparison.txt")
    run.json(comparison.to_json(), TABLE)
    run.figure(draw(comparison), PLOT)
