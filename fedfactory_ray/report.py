"""The report of a finished run, and the tables that a person reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from fedfactory_ray.data.partition import Partition
from fedfactory_ray.data.source import DataInfo

if TYPE_CHECKING:
    from fedfactory_ray.classification.evaluation import Evaluation


@dataclass(frozen=True)
class Report:
    """What a finished run tells: seconds a phase, images and bytes, and an evaluation for each classifier."""

    name: str
    storage: str
    tracking_uri: str
    model_uri: str
    modules: int
    uploaded_bytes: int
    synthetic_images: int
    seconds: dict[str, float]
    evaluations: dict[str, Evaluation]


def partition_table(partition: Partition, info: DataInfo, most: int = 20) -> Table:
    """The client × class table of image counts, its first `most` clients."""
    table = Table(title=f"images a client and class (partition {partition.sha256[:12]})", title_justify="left")
    table.add_column("client")
    for class_name in info.class_names:
        table.add_column(class_name[:12], justify="right")
    for client, row in list(zip(partition.clients, partition.matrix(), strict=True))[:most]:
        table.add_row(client, *(str(n) if n else "·" for n in row))
    if len(partition.clients) > most:
        table.add_row(f"… {len(partition.clients) - most} more")
    return table


def report_table(report: Report) -> Table:
    """The table at the end: results first, then what they cost."""
    table = Table(title=f"FederatedFactory · {report.name}", title_justify="left", show_header=False)
    for method, evaluation in report.evaluations.items():
        table.add_row(f"accuracy, {method}", str(evaluation.accuracy))
    first = next(iter(report.evaluations.values()))
    table.add_row("  balanced accuracy", str(first.balanced_accuracy))
    table.add_row("  AUROC · macro F1", f"{first.auroc:.4f} · {first.macro_f1:.4f}")
    table.add_row("majority class", f"{first.majority:.4f}", end_section=True)
    table.add_row("modules uploaded, once", f"{report.modules} ({report.uploaded_bytes / 1e6:.2f} MB)")
    table.add_row("synthetic images", str(report.synthetic_images), end_section=True)
    for phase, seconds in report.seconds.items():
        table.add_row(f"seconds, {phase}", f"{seconds:.1f}")
    return table
