"""The report of a finished run, and the tables that a person reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from fedfactory_ray.data.partition import Partition
from fedfactory_ray.data.source import DataInfo
from fedfactory_ray.storage.layout import MIXTURE, PRODUCT
from fedfactory_ray.tracking.table import PlainTable

if TYPE_CHECKING:
    from fedfactory_ray.classification.evaluation import Difference, Judged


NOTE = "95 % intervals: test sampling only, one fit each. The announced prior: class shares that clients declare."
"""What the figures of one seed are."""
NAMED = 5
"""Shares that are named; others are counted."""
COMPARED = {
    "accuracy": "accuracy, announced prior",
    "balanced_accuracy": "balanced accuracy, classes alike",
}
"""Figures of Judged and of Difference by which classifiers are compared, and the rows' titles."""


@dataclass(frozen=True)
class Report:
    """What a finished run tells: seconds a phase, images and bytes, and an evaluation for each classifier.

    `main` is the evaluation that the job is about. With experts: each alone, by client, and why an expert is missing.
    `at_home` are shares that trained no module, for lack of images, `left_out` the modules, a text each, that the run
    goes without, and `absent` the classes of which there is none.
    `differences` tell what the product and Architecture I's classifier gain on each other classifier.
    """

    name: str
    storage: str
    tracking_uri: str
    models: dict[str, str]
    modules: int
    uploaded_bytes: int
    downlink_bytes: int
    expert_bytes: int
    synthetic_images: int
    seconds: dict[str, float]
    main: str
    evaluations: dict[str, Judged]
    experts: dict[str, Judged]
    differences: dict[str, dict[str, Difference]]
    missing: dict[str, str]
    at_home: list[str]
    left_out: list[str]
    absent: list[str]


def told_at_home(partition: Partition, info: DataInfo, min_images: int) -> list[str]:
    """Whose images of which class are too few to train a module, and how many they are."""
    small = partition.at_home(min_images)
    return [f"{client} class {info.class_names[label]} ({n})" for client, label, n in small]


def absent_classes(modules: Iterable[tuple[str, int]], info: DataInfo) -> list[str]:
    """Names of the classes of which there is none of the `modules` (client, label)."""
    offered = {label for _, label in modules}
    return [name for label, name in enumerate(info.class_names) if label not in offered]


def partition_table(partition: Partition, info: DataInfo, min_images: int = 1, most: int = 20) -> PlainTable:
    """The client × class table of image counts, its first `most` clients; in parentheses those of fewer than
    `min_images` images, which train no module."""
    table = PlainTable(title=f"images a client and class (partition {partition.sha256[:12]})", title_justify="left")
    table.add_column("client")
    for class_name in info.class_names:
        table.add_column(class_name[:12], justify="right")
    for client, row in list(zip(partition.clients, partition.matrix(), strict=True))[:most]:
        table.add_row(client, *(str(n) if n >= min_images else f"({n})" if n else "·" for n in row))
    if len(partition.clients) > most:
        table.add_row(f"… {len(partition.clients) - most} more")
    small = partition.at_home(min_images)
    if small:
        n_images = sum(n for _, _, n in small)
        told = f"(n): fewer than generator.min_images={min_images}, no module is trained: {len(small)} of "
        told += f"{len(list(partition))} shares, {n_images} images stay at home"
        table.caption = Text(told, "table.caption")
    return table


def report_table(report: Report) -> PlainTable:
    """The table at the end: results first, then what they cost."""
    table = PlainTable(title=f"FederatedFactory · {report.name}", title_justify="left", show_header=False)
    table.caption = Text(NOTE, "table.caption")
    combined = f" of {len(report.experts)} experts" + (f", {len(report.missing)} MISSING" if report.missing else "")
    names = {m: m + combined * (m in (PRODUCT, MIXTURE)) for m in report.evaluations}
    pairs = {f"{ours} less {m}": each for ours, all_ in report.differences.items() for m, each in all_.items()}
    for figure, title in COMPARED.items():
        table.add_row(title)
        for method, judged in report.evaluations.items():
            table.add_row(f"  {names[method]}", str(getattr(judged, figure)))
        if report.experts:
            lone = [getattr(judged, figure).value for judged in report.experts.values()]
            table.add_row("  lone experts, mean", _spread(lone))
        for pair, difference in pairs.items():
            table.add_row(f"  {pair}", getattr(difference, figure).signed)
    table.add_row("NLL · ECE, announced prior (uncalibrated)")
    for method, judged in report.evaluations.items():
        found = judged.announced
        before = f"({judged.raw_nll:.4f} · {judged.raw_ece:.4f})"
        table.add_row(f"  {names[method]}", f"{found.nll:.4f} · {found.ece:.4f} {before}")
    main = report.evaluations[report.main].alike
    table.add_row(f"AUROC · macro F1, classes alike, {report.main}", f"{main.auroc:.4f} · {main.macro_f1:.4f}")
    table.add_row("majority class", f"{main.majority:.4f}", end_section=True)
    for client, why in report.missing.items():
        table.add_row(f"expert of {client} MISSING", why[:60])
    if report.at_home:
        more = len(report.at_home) - NAMED
        named = [*report.at_home[:NAMED], *[f"and {more} more"] * (more > 0)]
        table.add_row(f"stay at home, too small for a module: {len(report.at_home)}", "\n".join(named))
    for each in report.left_out:
        table.add_row("module LEFT OUT", each)
    if report.absent:
        table.add_row("classes without a module", ", ".join(report.absent))
    table.add_row("modules uploaded, once", f"{report.modules} ({report.uploaded_bytes / 1e6:.2f} MB)")
    if report.experts:
        table.add_row("modules of others, downlinks", f"{report.downlink_bytes / 1e6:.2f} MB")
        table.add_row("experts uploaded", f"{len(report.experts)} ({report.expert_bytes / 1e6:.2f} MB)")
    table.add_row("synthetic images", str(report.synthetic_images), end_section=True)
    for phase, seconds in report.seconds.items():
        table.add_row(f"seconds, {phase}", f"{seconds:.1f}")
    return table


def _spread(values: list[float]) -> str:
    return f"{sum(values) / len(values):.4f} (from {min(values):.4f} to {max(values):.4f})"
