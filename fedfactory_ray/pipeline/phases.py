"""The main job: partition → modules → synthetic images → classifier, experts → evaluation, logged as it goes.

Each phase imports what it needs: clients are at work before the driver has loaded torch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import ray
from rich.console import Console

from fedfactory_ray.generation.card import Modules
from fedfactory_ray.pipeline.report import Report, partition_table
from fedfactory_ray.pipeline.results import expert_bytes, log_results, uploaded_bytes
from fedfactory_ray.pipeline.session import Session, open_session
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.layout import ENVIRONMENT, EVALUATION, METHOD
from fedfactory_ray.tracking import plots
from fedfactory_ray.tracking import runs as tracking
from fedfactory_ray.tracking.progress import bars
from fedfactory_ray.tracking.runs import ClientRun, Curves

if TYPE_CHECKING:
    from fedfactory_ray.classification.prediction import TestResult
    from fedfactory_ray.classification.rows import Rows
    from fedfactory_ray.classification.training import Classifier
    from fedfactory_ray.data.source import Task
    from fedfactory_ray.federation.experts import Experts
    from fedfactory_ray.synthesis.shard import Shard


def run(config: Config, console: Console) -> Report:
    """Run FederatedFactory as configured, or go on where an earlier start of the same run stopped.

    Architecture I fits one classifier on the synthetic images, Architecture II an expert a client; both from the same.

    Raises FedFactoryError for what the user can mend; then nothing was trained.
    """
    with open_session(config, console) as session:
        console.print(partition_table(session.partition, session.info))
        report = run_phases(session)
    return report


def run_phases(session: Session) -> Report:
    """All phases in an open session; what stands in its storage and verifies is not made again."""
    config, client_runs = session.config, dict[str, ClientRun]()
    modules = train_modules(session, client_runs)
    manifest = draw_images(session, modules)
    task = make_task(session)
    classifiers = {}
    if config.architecture != "decentralised":
        classifiers[METHOD] = fit_classifier(session, METHOD, synthetic_rows(session, manifest), task)
    if "centralised" in config.references:
        classifiers["centralised"] = fit_centralised(session, task)
    experts = None if config.architecture == "centralised" else fit_experts(session, modules, manifest, task)
    result, drawn = evaluate(session, task, manifest, classifiers, experts)
    models = log_results(session, task, modules, manifest, classifiers, experts, result, drawn, client_runs)
    return Report(
        name=session.name,
        storage=session.storage.uri,
        tracking_uri=tracking.tracking_uri(config),
        models=models,
        modules=len(modules),
        uploaded_bytes=uploaded_bytes(modules),
        downlink_bytes=experts.downlink_bytes if experts else 0,
        expert_bytes=expert_bytes(session, experts) if experts else 0,
        synthetic_images=sum(shard.n for shard in manifest),
        seconds=session.seconds,
        main=config.main_method,
        evaluations=result.evaluations,
        experts=result.experts,
        differences=result.differences,
        missing=experts.missing if experts else {},
    )


def make_task(session: Session) -> Task:
    """What the classifiers of this session are made for."""
    from fedfactory_ray.data.source import Task

    return Task(session.info.classes, session.info.channels, session.info.resolution)


def train_modules(session: Session, client_runs: dict[str, ClientRun]) -> Modules:
    """Every client trains its modules and uploads each once."""
    from fedfactory_ray.federation.client import Progress, Upload
    from fedfactory_ray.federation.round import run_round

    config = session.config
    total = sum(config.generator.steps(len(indices)) for _, _, indices in session.partition)
    done: dict[tuple[str, int], int] = {}
    with session.phase("modules"), bars(session.console, "training modules", total, "steps") as shown:

        def on_client(event: Progress | Upload) -> None:
            client = event.card.client if isinstance(event, Upload) else event.client
            client_run = client_runs.setdefault(client, ClientRun(session.logged, client))
            if isinstance(event, Upload):
                client_run.upload(event)
                return
            client_run.progress(event)
            done[client, event.label] = event.step
            shown.part(f"{client} class {event.label}", event.step, event.steps, f"loss {event.loss:.3f}")
            shown.update(sum(done.values()))

        modules = run_round(config, session.partition, session.plan.client, session.storage, on_client)
        shown.update(total)
    return modules


def draw_images(session: Session, modules: Modules) -> list[Shard]:
    """A class-balanced data set is drawn from the modules."""
    from fedfactory_ray.synthesis.synthesize import Drawn, synthesize

    total = session.config.synthesis.images_per_class * len({label for _, label in modules})
    places: Counter[str] = Counter()
    with session.phase("synthesis"), bars(session.console, "drawing images", total, "images") as shown:

        def on_unit(drawn: Drawn) -> None:
            if drawn.node is not None:
                places[" ".join([drawn.node, *(f"gpu {gpu}" for gpu in drawn.gpus)])] += 1
            shown.update(drawn.images)

        manifest = synthesize(session.config, modules, session.plan.synthesis, session.storage, on_unit)
    images, seconds = sum(shard.n for shard in manifest), session.seconds["synthesis"]
    run = session.run.child("synthesis")
    run.json([vars(shard) for shard in manifest], "manifest.json")
    run.json(places, "units_by_node.json")
    run.metrics({"images": images, "seconds": seconds, "images_per_second": images / seconds})
    run.end()
    return manifest


def synthetic_rows(session: Session, manifest: list[Shard]) -> Rows:
    """The drawn images as a classifier's rows."""
    from fedfactory_ray.classification.rows import shard_rows
    from fedfactory_ray.synthesis.shard import manifest_digest

    return shard_rows(session.storage, manifest, manifest_digest(manifest), session.config.synthesis.unit_size)


def fit_classifier(session: Session, method: str, rows: Rows, task: Task) -> Classifier:
    """The classifier is fitted; curves are logged as they grow."""
    from fedfactory_ray.classification.fitting import Epoch
    from fedfactory_ray.classification.training import fit

    config = session.config
    child = session.run.child(f"classifier-{method}")
    curves = Curves(child)
    with (
        session.phase(f"classifier ({method})"),
        bars(session.console, f"fitting {method}", config.classifier.epochs, "epochs") as shown,
    ):

        def on_epoch(epoch: Epoch) -> None:
            shown.update(epoch.epoch, f"validation accuracy {epoch.validation_accuracy:.3f}")
            curves.add(epoch)

        classifier = fit(config, rows, task, session.plan.classifier, session.storage, method, on_epoch)
    curves.rest(classifier.history)
    child.metrics({"images": rows.images, "chosen_epoch": classifier.epoch})
    child.tag("sha256", classifier.sha256)
    child.end()
    return classifier


def fit_centralised(session: Session, task: Task) -> Classifier:
    """The reference: the same classifier by the same recipe on all real images, for no fewer optimiser steps."""
    from fedfactory_ray.baselines.centralised import real_rows, reference_config

    rows = real_rows(session.config, session.partition, session.info)
    longer = replace(session, config=reference_config(session.config, session.partition))
    return fit_classifier(longer, "centralised", rows, task)


def fit_experts(session: Session, modules: Modules, manifest: list[Shard], task: Task) -> Experts:
    """Every client fits its expert, side by side; curves are logged as they grow."""
    from fedfactory_ray.classification.fitting import Epoch
    from fedfactory_ray.federation import experts as ensemble
    from fedfactory_ray.federation.expert import Expert, assign

    config, partition = session.config, session.partition
    cards = [handle.card for handle in modules.values()]
    assignments = [assign(config, client, share, manifest, cards, task) for client, share in partition.shares.items()]
    children: dict[str, Curves] = {}
    done: dict[str, int] = {}
    epochs = config.classifier.epochs
    with (
        session.phase("experts"),
        bars(session.console, "fitting experts", epochs * len(assignments), "epochs") as shown,
    ):

        def on_expert(client: str, event: Epoch | Expert) -> None:
            if client not in children:
                children[client] = Curves(session.run.child(f"expert-{client}"))
            curves = children[client]
            if isinstance(event, Expert):
                curves.rest(event.history)
                figures = ("real", "pool", "downlink_bytes")
                curves.run.metrics({name: getattr(event, name) for name in figures} | {"chosen_epoch": event.epoch})
                curves.run.tag("sha256", event.sha256)
                curves.run.end()
                done[client] = epochs
            else:
                curves.add(event)
                done[client] = event.epoch
                shown.part(f"expert of {client}", event.epoch, epochs, f"accuracy {event.validation_accuracy:.3f}")
            shown.update(sum(done.values()))

        experts = ensemble.fit_experts(config, assignments, session.plan.client, session.storage, on_expert)
    for client, reason in experts.missing.items():
        session.console.print(f"expert of {client} is missing, the product is without it: {reason}", markup=False)
        session.run.tag(f"missing_expert.{client}", reason)
        if client in children:
            children[client].run.end("FAILED")
    return experts


def evaluate(
    session: Session, task: Task, manifest: list[Shard], classifiers: dict[str, Classifier], experts: Experts | None
) -> tuple[TestResult, dict[tuple[str, int], np.ndarray]]:
    """The test split is read once, for all classifiers and experts; some images of each module come along."""
    from fedfactory_ray.classification.prediction import evaluate_on_test
    from fedfactory_ray.synthesis.previews import previews

    worker = session.plan.classifier
    with session.phase("evaluation"):
        result = evaluate_on_test.options(num_cpus=worker.num_cpus, num_gpus=worker.num_gpus).remote(
            session.config,
            task,
            worker.resources,
            session.storage,
            {method: classifier.folder for method, classifier in classifiers.items()},
            experts.folders if experts else {},
            plots.GRID_COLUMNS,
        )
        drawn = previews.remote(session.storage, manifest, task.image_shape, plots.GRID_COLUMNS)
        tested, shown = ray.get([result, drawn])
    figures: dict[str, object] = {m: e.scalars() for m, e in tested.evaluations.items()}
    if experts:
        figures["experts"] = {client: e.scalars() for client, e in tested.experts.items()}
        figures["missing_experts"] = experts.missing
        figures["product_less"] = {m: difference.scalars() for m, difference in tested.differences.items()}
    figures["predictions_sha256"] = tested.digests
    known = session.storage.read_json(ENVIRONMENT) if session.storage.exists(ENVIRONMENT) else []
    session.storage.write_json(ENVIRONMENT, known + [tested.environment] * (tested.environment not in known))
    session.storage.write_json(EVALUATION, figures)
    return tested, shown
