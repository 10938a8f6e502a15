"""What a fulfilled request tells: a table for a person, tags, metrics and a picture for MLflow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedfactory_ray.pipeline.session import Session
from fedfactory_ray.storage.layout import CERTIFICATE
from fedfactory_ray.tracking import plots
from fedfactory_ray.tracking.table import PlainTable
from fedfactory_ray.unlearning.certificate import Certificate
from fedfactory_ray.unlearning.facts import Facts, alike


def recalls(facts: Facts, method: str) -> dict[int, float]:
    """Recall by class of an evaluation, with the classes alike."""
    prefix = "recall_class_"
    scores = alike(facts.scores[method])
    return {int(name.removeprefix(prefix)): value for name, value in scores.items() if name.startswith(prefix)}


def held_recall(facts: Facts, method: str, absent: Sequence[int]) -> float:
    """Mean recall of the classes that somebody still holds."""
    return float(np.mean([value for label, value in recalls(facts, method).items() if label not in absent]))


def log_certificate(session: Session, certificate: Certificate) -> None:
    """Tags, metrics before and after, the plot of recall, and the certificate itself, in the new run."""
    run, method = session.run, certificate.after.main_method
    run.tag("forgotten", ", ".join(certificate.request.exclude))
    run.tag("forgotten.asked_by", certificate.request.asked_by)
    for when, facts in (("before", certificate.before), ("after", certificate.after)):
        run.metrics({f"{when}/{name}": value for name, value in facts.scores[method].items()})
        run.metrics({f"{when}/recall_of_held_classes": held_recall(facts, method, certificate.absent)})
    run.metrics({f"share_of_original/{name}": value for name, value in certificate.cost["share"].items()})
    picture = plots.recall_plot(
        recalls(certificate.before, method), recalls(certificate.after, method), session.info.class_names
    )
    run.figure(picture, "recall.png")
    run.text(certificate.to_json().decode(), CERTIFICATE)


def certificate_table(certificate: Certificate) -> PlainTable:
    """What a person wants to know of a fulfilled request."""
    request, spent, share = certificate.request, certificate.cost["spent"], certificate.cost["share"]
    method = certificate.after.main_method
    table = PlainTable(title=f"forgotten · {', '.join(request.exclude)}", title_justify="left", show_header=False)
    table.add_row("run", f"{request.run} (deleted) → {request.successor}")
    for kind, gone in certificate.deleted.items():
        table.add_row(f"deleted {kind}", str(len(gone)))
    for note in certificate.after.divergences:
        table.add_row("module LEFT OUT", str(note))
    table.add_row("kept", ", ".join(f"{n} {kind}" for kind, n in certificate.kept.items()), end_section=True)
    for name in ("images_drawn", "network_evaluations", "fits", "seconds"):
        part = f" ({share[name]:.1%} of the original run's)" if name in share else ""
        table.add_row(name.replace("_", " "), f"{spent[name]:.0f}{part}")
    if certificate.absent:
        table.add_row("classes that nobody holds now", ", ".join(map(str, certificate.absent)))
    found = [alike(facts.scores[method]) for facts in (certificate.before, certificate.after)]
    for name, value in (
        ("accuracy, classes alike", [scores["accuracy"] for scores in found]),
        ("mean recall", [scores["balanced_accuracy"] for scores in found]),
        (
            "mean recall, classes held",
            [held_recall(f, method, certificate.absent) for f in (certificate.before, certificate.after)],
        ),
    ):
        table.add_row(f"{name}, before → after", f"{value[0]:.4f} → {value[1]:.4f}")
    exact = "; ".join(certificate.inexact) or "yes: equal to a run without them, bit for bit"
    table.add_row("exact", f"not promised: {exact}" if certificate.inexact else exact)
    return table
