"""The main job: partition → modules → synthetic images → classifier → evaluation, logged as it goes.

Each phase imports what it needs: clients are at work before the driver has loaded torch.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np
import ray
from rich.console import Console

from fedfactory_ray import plots, tracking
from fedfactory_ray.config import Config
from fedfactory_ray.progress import bars
from fedfactory_ray.report import Report, partition_table
from fedfactory_ray.session import Session, open_session
from fedfactory_ray.tracking import ClientRun

if TYPE_CHECKING:
    from fedfactory_ray.classification.models import Task
    from fedfactory_ray.classification.prediction import TestResult
    from fedfactory_ray.classification.rows import Rows
    from fedfactory_ray.classification.training import Classifier
    from fedfactory_ray.federation.round import ModuleHandle
    from fedfactory_ray.synthesis.synthesize import Shard

METHOD = "fedfactory"
Modules = dict[tuple[str, int], "ModuleHandle"]


def run(config: Config, console: Console) -> Report:
    """Run FederatedFactory's Architecture I as configured, or go on where an earlier start of the same run stopped.

    Raises FedFactoryError for what the user can mend; then nothing was trained.
    """
    with open_session(config, console) as session:
        console.print(partition_table(session.partition, session.info))
        client_runs: dict[str, ClientRun] = {}
        modules = train_modules(session, client_runs)
        manifest = draw_images(session, modules)
        task = make_task(session)
        classifiers = {
            method: fit_classifier(session, method, rows, task)
            for method, rows in training_rows(session, manifest).items()
        }
        result, drawn = evaluate(session, task, manifest, classifiers)
        model_uri = log_results(session, task, modules, manifest, classifiers, result, drawn, client_runs)
    return Report(
        name=session.name,
        storage=session.storage.uri,
        tracking_uri=tracking.tracking_uri(config),
        model_uri=model_uri,
        modules=len(modules),
        uploaded_bytes=uploaded_bytes(modules),
        synthetic_images=sum(shard.n for shard in manifest),
        seconds=session.seconds,
        evaluations=result.evaluations,
    )


def uploaded_bytes(modules: Modules) -> int:
    """Bytes of all uploads: weights and cards."""
    return sum(handle.card.size + len(handle.card.to_json()) for handle in modules.values())


def make_task(session: Session) -> Task:
    """What the classifiers of this session are made for."""
    from fedfactory_ray.classification.models import Task

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
    from fedfactory_ray.synthesis.synthesize import synthesize

    total = session.config.synthesis.images_per_class * len({label for _, label in modules})
    with session.phase("synthesis"), bars(session.console, "drawing images", total, "images") as shown:
        return synthesize(
            session.config, modules, session.plan.synthesis, session.storage, lambda n, _: shown.update(n)
        )


def training_rows(session: Session, manifest: list[Shard]) -> dict[str, Rows]:
    """Rows to fit a classifier on, by method: the synthetic ones, and those of the references."""
    from fedfactory_ray.baselines.centralised import real_rows

    rows = {METHOD: synthetic_rows(session, manifest)}
    if "centralised" in session.config.baselines:
        rows["centralised"] = real_rows(session.config, session.partition, session.info)
    return rows


def synthetic_rows(session: Session, manifest: list[Shard]) -> Rows:
    """The drawn images as a classifier's rows."""
    from fedfactory_ray.classification.rows import shard_rows

    digest = hashlib.sha256("".join(shard.rows_sha256 for shard in manifest).encode()).hexdigest()
    return shard_rows(session.storage, manifest, digest, session.config.synthesis.unit_size)


def fit_classifier(session: Session, method: str, rows: Rows, task: Task) -> Classifier:
    """The classifier is fitted, the references with the same recipe; curves are logged as they grow."""
    from fedfactory_ray.classification.fitting import Epoch
    from fedfactory_ray.classification.training import fit

    config = session.config
    child = session.run.child(f"classifier-{method}")
    with (
        session.phase(f"classifier ({method})"),
        bars(session.console, f"fitting {method}", config.classifier.epochs, "epochs") as shown,
    ):
        logged: set[int] = set()

        def log(epoch: Epoch) -> None:
            logged.add(epoch.epoch)
            child.metrics({k: v for k, v in vars(epoch).items() if k not in ("epoch", "epochs")}, step=epoch.epoch)

        def on_epoch(epoch: Epoch) -> None:
            shown.update(epoch.epoch, f"validation accuracy {epoch.validation_accuracy:.3f}")
            log(epoch)

        classifier = fit(config, rows, task, session.plan.classifier, session.storage, method, on_epoch)
    for epoch in classifier.history:
        if epoch.epoch not in logged:  # of an earlier start of the run
            log(epoch)
    child.metrics({"images": rows.images, "chosen_epoch": classifier.epoch})
    child.tag("sha256", classifier.sha256)
    child.end()
    return classifier


def evaluate(
    session: Session, task: Task, manifest: list[Shard], classifiers: dict[str, Classifier]
) -> tuple[TestResult, dict[tuple[str, int], np.ndarray]]:
    """The test split is read once, for all classifiers; a few synthetic images of each module come along."""
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
            plots.GRID_COLUMNS,
        )
        drawn = previews.remote(session.storage, manifest, task.image_shape, plots.GRID_COLUMNS)
        tested, shown = ray.get([result, drawn])
    session.storage.write_json("evaluation.json", {m: e.scalars() for m, e in tested.evaluations.items()})
    return tested, shown


def log_results(
    session: Session,
    task: Task,
    modules: Modules,
    manifest: list[Shard],
    classifiers: dict[str, Classifier],
    result: TestResult,
    drawn: dict[tuple[str, int], np.ndarray],
    client_runs: dict[str, ClientRun],
) -> str:
    """The driver logs what there is to see; returns the URI of the logged classifier."""
    from fedfactory_ray.classification.models import Predictor
    from fedfactory_ray.classification.prediction import load_network

    run, partition, class_names = session.run, session.partition, session.info.class_names
    with session.phase("logging"):
        run.figure(plots.partition_plot(partition.matrix(), partition.clients, class_names), "partition.png")
        cards = [handle.card for handle in modules.values()]
        for client in partition.clients:
            synthetic = {label: images for (c, label), images in drawn.items() if c == client}
            client_runs.setdefault(client, ClientRun(session.logged, client)).finish(
                [card for card in cards if card.client == client],
                plots.sample_grid(synthetic, result.examples, class_names, client),
            )
        images, seconds = sum(shard.n for shard in manifest), session.seconds["synthesis"]
        synthesis_run = run.child("synthesis")
        synthesis_run.json([vars(shard) for shard in manifest], "manifest.json")
        synthesis_run.metrics({"images": images, "seconds": seconds, "images_per_second": images / seconds})
        synthesis_run.end()
        evaluation_run = run.child("evaluation")
        for method, evaluation in result.evaluations.items():
            evaluation_run.metrics({f"{method}/{k}": v for k, v in evaluation.scalars().items()})
            title = f"{method}: accuracy {evaluation.accuracy.value:.3f}"
            evaluation_run.figure(
                plots.confusion_plot(evaluation.confusion, class_names, title), f"confusion-{method}.png"
            )
        evaluation_run.end()
        run.json(json.loads(session.storage.read("partition.json")), "partition.json")
        run.json([vars(card) for card in cards], "modules.json")
        predictor = Predictor(load_network(session.config, task, session.storage, classifiers[METHOD].folder))
        examples = np.concatenate(list(result.examples.values()))
        model_uri = run.model(predictor.eval(), examples, result.probabilities)
        run.metrics(result.evaluations[METHOD].scalars())
        run.metrics({"uploaded_bytes": uploaded_bytes(modules), "synthetic_images": images, "modules": len(modules)})
    run.metrics({f"seconds/{k}".replace("(", "").replace(")", ""): v for k, v in session.seconds.items()})
    return model_uri
