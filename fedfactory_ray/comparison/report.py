"""What a comparison tells: lines of a table, a plot, and both in storage and MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.text import Text

from fedfactory_ray.storage.layout import METHOD, PLOT, TABLE
from fedfactory_ray.tracking import plots
from fedfactory_ray.tracking.runs import Run
from fedfactory_ray.tracking.table import PlainTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fedfactory_ray.classification.evaluation import Difference

FACTORY, FACTORY_II = METHOD, f"{METHOD}-ii"
ENSEMBLE, MEAN, BEST = "local, ensemble", "local, mean", "local, best on test"
LONE = f"{FACTORY_II}, lone experts, mean"
COMPARED = ("accuracy", "balanced_accuracy", "auroc")


@dataclass(frozen=True)
class MethodLine:
    """A line of the table. `scores` are an evaluation's scalars, or over seeds their means, with `<score>_std`.

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
    II's line is without the experts of the clients `missing`; methods that `diverged` at once are untrained; `gained`
    is, for each seed, what Architecture II gains on I, where both were compared."""

    name: str
    storage: str
    lines: list[MethodLine]
    curves: dict[str, list[float]]
    missing: tuple[str, ...] = ()
    diverged: tuple[str, ...] = ()
    gained: tuple[Difference, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For storage and MLflow; all but the curves."""
        lines, gained = [vars(line) for line in self.lines], [each.scalars() for each in self.gained]
        return {
            "lines": lines,
            "missing": self.missing,
            "diverged": self.diverged,
            f"{FACTORY_II} less {FACTORY}": gained,
        }


def over_seeds(found: Sequence[Comparison]) -> Comparison:
    """Means over seeds, and standard deviations (n - 1) of the scores."""
    lines = []
    for same in zip(*(comparison.lines for comparison in found), strict=True):
        scores = {score: np.array([line.scores[score] for line in same]) for score in COMPARED}
        lines.append(
            MethodLine(
                same[0].method,
                {k: float(v.mean()) for k, v in scores.items()}
                | {f"{k}_std": float(v.std(ddof=1)) for k, v in scores.items()},
                None if same[0].rounds is None else float(np.mean([line.rounds for line in same])),
                *(float(np.mean([getattr(line, k) for line in same])) for k in ("bytes_up", "bytes_down", "seconds")),
            )
        )
    name = f"{found[0].name}-and-{len(found) - 1}-more-seeds"
    missing, diverged = (
        tuple(f"{one} ({comparison.name})" for comparison in found for one in getattr(comparison, kind))
        for kind in ("missing", "diverged")
    )
    gained = tuple(gain for comparison in found for gain in comparison.gained)
    return Comparison(name, found[0].storage, lines, found[0].curves, missing, diverged, gained)


def score_text(scores: dict[str, float], score: str) -> str:
    """A score with its deviation over seeds; with one seed, accuracy has its bootstrap interval on the test split."""
    value = f"{scores[score]:.4f}"
    if f"{score}_std" in scores:
        return f"{value} ± {scores[f'{score}_std']:.4f}"
    if score == "accuracy" and "accuracy_low" in scores:
        return f"{value} [{scores[f'{score}_low']:.4f}, {scores[f'{score}_high']:.4f}]"
    return value


def comparison_table(comparison: Comparison) -> PlainTable:
    """The table at the end."""
    table = PlainTable(title=f"comparison · {comparison.name}", title_justify="left")
    for column in ("method", "accuracy", "balanced", "AUROC", "rounds", "MB up", "MB down", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right", overflow="fold")
    for line in comparison.lines:
        table.add_row(
            line.method,
            *(score_text(line.scores, score) for score in COMPARED),
            "–" if line.rounds is None else f"{line.rounds:g}",
            f"{line.bytes_up / 1e6:.2f}",
            f"{line.bytes_down / 1e6:.2f}",
            f"{line.seconds:.0f}",
        )
    notes = []
    if comparison.missing:
        notes.append(f"{FACTORY_II} is without the experts of {', '.join(comparison.missing)}")
    if comparison.diverged:
        notes.append(f"diverged at once, shown untrained: {', '.join(comparison.diverged)}")
    if comparison.gained:
        accuracy, balanced = (
            ", ".join(getattr(gain, score).signed for gain in comparison.gained) for score in COMPARED[:2]
        )
        notes.append(f"{FACTORY_II} less {FACTORY}, paired: accuracy {accuracy}")
        notes.append(f"balanced accuracy {balanced}")
    table.caption = Text("\n".join(notes), "table.caption") if notes else None
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
