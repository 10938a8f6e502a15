"""The report of a finished run, and the tables that a person reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedfactory_ray.data.partition import Partition
from fedfactory_ray.data.source import DataInfo
from fedfactory_ray.storage.layout import MIXTURE, PRODUCT
from fedfactory_ray.tracking.table import PlainTable

if TYPE_CHECKING:
    from fedfactory_ray.classification.evaluation import Difference, Evaluation


@dataclass(frozen=True)
class Report:
    """What a finished run tells: seconds a phase, images and bytes, and an evaluation for each classifier.

    `main` is the evaluation that the job is about. With experts: each alone, by client; the accuracy of their product
    less that of each classifier; and why an expert is missing, by client.
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
    evaluations: dict[str, Evaluation]
    experts: dict[str, Evaluation]
    differences: dict[str, Difference]
    missing: dict[str, str]


def partition_table(partition: Partition, info: DataInfo, most: int = 20) -> PlainTable:
    """The client × class table of image counts, its first `most` clients."""
    table = PlainTable(title=f"images a client and class (partition {partition.sha256[:12]})", title_justify="left")
    table.add_column("client")
    for class_name in info.class_names:
        table.add_column(class_name[:12], justify="right")
    for client, row in list(zip(partition.clients, partition.matrix(), strict=True))[:most]:
        table.add_row(client, *(str(n) if n else "·" for n in row))
    if len(partition.clients) > most:
        table.add_row(f"… {len(partition.clients) - most} more")
    return table


def report_table(report: Report) -> PlainTable:
    """The table at the end: results first, then what they cost."""
    table = PlainTable(title=f"FederatedFactory · {report.name}", title_justify="left", show_header=False)
    combined = f" of {len(report.experts)} experts" + (f", {len(report.missing)} MISSING" if report.missing else "")
    for method, evaluation in report.evaluations.items():
        table.add_row(f"accuracy, {method}{combined * (method in (PRODUCT, MIXTURE))}", str(evaluation.accuracy))
    if report.experts:
        lone = [evaluation.accuracy.value for evaluation in report.experts.values()]
        mean = sum(lone) / len(lone)
        table.add_row("  mean of lone experts", f"{mean:.4f} (from {min(lone):.4f} to {max(lone):.4f})")
    for method, difference in report.differences.items():
        table.add_row(f"  {PRODUCT} less {method}", difference.accuracy.signed)
        table.add_row("    balanced accuracy", difference.balanced_accuracy.signed)
    main = report.evaluations[report.main]
    table.add_row(f"balanced accuracy, {report.main}", str(main.balanced_accuracy))
    table.add_row(f"AUROC · macro F1, {report.main}", f"{main.auroc:.4f} · {main.macro_f1:.4f}")
    table.add_row("majority class", f"{main.majority:.4f}", end_section=True)
    for client, why in report.missing.items():
        table.add_row(f"expert of {client} MISSING", why[:60])
    table.add_row("modules uploaded, once", f"{report.modules} ({report.uploaded_bytes / 1e6:.2f} MB)")
    if report.experts:
        table.add_row("modules of others, downlinks", f"{report.downlink_bytes / 1e6:.2f} MB")
        table.add_row("experts uploaded", f"{len(report.experts)} ({report.expert_bytes / 1e6:.2f} MB)")
    table.add_row("synthetic images", str(report.synthetic_images), end_section=True)
    for phase, seconds in report.seconds.items():
        table.add_row(f"seconds, {phase}", f"{seconds:.1f}")
    return table
