"""A job repeated with several seeds, which tells what the figures of one fit do not: how much fits vary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import StringIO

from rich.console import Console
from rich.text import Text

from fedfactory_ray.classification.intervals import Interval, over_seeds
from fedfactory_ray.classification.rules import ALIKE, ANNOUNCED
from fedfactory_ray.errors import ConfigError
from fedfactory_ray.pipeline import phases
from fedfactory_ray.pipeline.report import COMPARED, Report, report_table
from fedfactory_ray.settings.config import Config
from fedfactory_ray.tracking import runs as tracking
from fedfactory_ray.tracking.table import PlainTable

FIGURES = {
    f"{ANNOUNCED}/accuracy": COMPARED["accuracy"],
    f"{ALIKE}/balanced_accuracy": COMPARED["balanced_accuracy"],
    f"{ANNOUNCED}/nll": "NLL, announced prior",
    f"{ANNOUNCED}/ece": "ECE, announced prior",
}
"""Scores that are told over seeds, and their names for a person."""


def each_seed(config: Config, seeds: int) -> Iterator[Config]:
    """The config with each of so many seeds, from its own on; a name that was given tells the seed. Raises
    ConfigError."""
    if seeds < 1:
        raise ConfigError([f"seeds: found {seeds}, needed at least 1"])
    for seed in range(config.seed, config.seed + seeds):
        name = f"{config.name}-seed{seed}" if config.name and seeds > 1 else config.name
        yield config.model_copy(update={"seed": seed, "name": name})


def run_seeds(config: Config, seeds: int, console: Console) -> PlainTable:
    """Run the main job with each of at least two seeds; partitions, modules and fits are new for each. Returns the
    table over seeds, which is logged as a run of its own."""
    reports = []
    for one in each_seed(config, seeds):
        reports.append(phases.run(one, console))
        console.print(report_table(reports[-1]))
    found, table = figures(reports), seeds_table(reports)
    run = tracking.start_run(config, f"{reports[0].name}-and-{seeds - 1}-more-seeds", reports[0].storage)
    for name, interval in found.items():
        run.metrics({name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high})
    text = StringIO()
    Console(file=text, width=160).print(table)
    run.text(text.getvalue(), "seeds.txt")
    run.end()
    return table


def figures(reports: Sequence[Report]) -> dict[str, Interval]:
    """Means over seeds with their intervals: `<method>/<score>`, and gains as `<first>_less_<second>/<figure>`."""
    found = {
        f"{method}/{score}": over_seeds([report.evaluations[method].scalars()[score] for report in reports])
        for method in reports[0].evaluations
        for score in FIGURES
    }
    return found | {
        f"{first}_less_{second}/{figure}": over_seeds(
            [getattr(report.differences[first][second], figure).value for report in reports]
        )
        for first, gained in reports[0].differences.items()
        for second in gained
        for figure in COMPARED
    }


def seeds_table(reports: Sequence[Report]) -> PlainTable:
    """The table over seeds, for a person."""
    found = figures(reports)
    title = f"FederatedFactory · {reports[0].name} and {len(reports) - 1} more seeds"
    table = PlainTable(title=title, title_justify="left", show_header=False)
    table.caption = Text(f"95 % intervals over {len(reports)} seeds, fits included, same test images", "table.caption")
    for score, title in FIGURES.items():
        table.add_row(title)
        for method in reports[0].evaluations:
            table.add_row(f"  {method}", str(found[f"{method}/{score}"]))
        rate = score.rpartition("/")[2]
        for first, gained in reports[0].differences.items():
            for second in gained:
                if (name := f"{first}_less_{second}/{rate}") in found:
                    table.add_row(f"  {first} less {second}, paired", found[name].signed)
    for report in reports:
        for each in report.left_out:
            table.add_row("module LEFT OUT", f"{each} ({report.name})")
    return table
