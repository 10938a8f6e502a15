"""What a finished run tells: pictures, figures and models in MLflow, and its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedfactory_ray.classification.rules import ANNOUNCED
from fedfactory_ray.generation.card import Modules
from fedfactory_ray.generation.divergence import read_divergences
from fedfactory_ray.pipeline.listeners import Listeners
from fedfactory_ray.pipeline.report import Report, absent_classes, told_at_home
from fedfactory_ray.pipeline.session import Session
from fedfactory_ray.storage.layout import METHOD, PARTITION, PRODUCT, WEIGHTS
from fedfactory_ray.tracking import plots
from fedfactory_ray.tracking.runs import tracking_uri

if TYPE_CHECKING:
    from fedfactory_ray.classification.card import Classifier
    from fedfactory_ray.classification.prediction import TestResult
    from fedfactory_ray.federation.experts import Experts
    from fedfactory_ray.synthesis.shard import Shard


@dataclass(frozen=True)
class Results:
    """What the phases made: what was `tested` on the test split, and some of each module's images to be `shown`, uint8
    (n, H, W, C) by client and class."""

    modules: Modules
    manifest: list[Shard]
    classifiers: dict[str, Classifier]
    experts: Experts | None
    tested: TestResult
    shown: dict[tuple[str, int], np.ndarray]

    def some_drawn(self) -> np.ndarray:
        """Synthetic images of each class, uint8 (n, H, W, C): what a logged model's example is made of."""
        by_label: dict[int, list[np.ndarray]] = {}
        for (_, label), images in self.shown.items():
            by_label.setdefault(label, []).append(images)
        return np.concatenate([np.concatenate(by_label[y])[: plots.GRID_COLUMNS] for y in sorted(by_label)])

    @property
    def n_images(self) -> int:
        """Number of synthetic images."""
        return sum(shard.n for shard in self.manifest)


def uploaded_bytes(modules: Modules) -> int:
    """Bytes of all uploads: weights and cards."""
    return sum(handle.card.upload_bytes for handle in modules.values())


def expert_bytes(session: Session, experts: Experts) -> int:
    """Bytes of the fitted experts' weights, which the product needs in one place."""
    return sum(session.storage.size(f"{folder}/{WEIGHTS}") for folder in experts.folders.values())


def make_report(session: Session, results: Results, models: dict[str, str]) -> Report:
    """The report of a run whose models are logged (name → URI)."""
    experts, tested = results.experts, results.tested
    return Report(
        name=session.name,
        storage=session.storage.uri,
        tracking_uri=tracking_uri(session.config),
        models=models,
        modules=len(results.modules),
        uploaded_bytes=uploaded_bytes(results.modules),
        downlink_bytes=experts.downlink_bytes if experts else 0,
        expert_bytes=expert_bytes(session, experts) if experts else 0,
        synthetic_images=results.n_images,
        seconds=session.seconds,
        main=session.config.main_method,
        evaluations=tested.evaluations,
        experts=tested.experts,
        differences=tested.differences,
        missing=experts.missing if experts else {},
        at_home=told_at_home(session.partition, session.info, session.config.generator.min_images),
        left_out=list(map(str, read_divergences(session.storage))),
        absent=absent_classes(results.modules, session.info),
    )


def log_results(session: Session, listeners: Listeners, results: Results) -> dict[str, str]:
    """The driver logs what there is to see; returns the URIs of the logged models by name."""
    run, tested, experts = session.run, results.tested, results.experts
    with session.phase("logging"):
        log_clients(session, listeners, results)
        log_evaluation(session, tested)
        run.json(session.storage.read_json(PARTITION), PARTITION)
        run.json([vars(handle.card) for handle in results.modules.values()], "modules.json")
        for note in read_divergences(session.storage):
            run.tag(f"left_out.{note.client}.{note.label}", f"training diverged: {note.why}")
        models = log_models(session, results)
        run.metrics(tested.evaluations[session.config.main_method].scalars())
        run.metrics({"uploaded_bytes": uploaded_bytes(results.modules)})
        if experts:
            moved = {"downlink_bytes": experts.downlink_bytes, "expert_bytes": expert_bytes(session, experts)}
            run.metrics(moved)
        run.metrics({"synthetic_images": results.n_images, "modules": len(results.modules)})
    run.metrics({f"seconds/{k}".replace("(", "").replace(")", ""): v for k, v in session.seconds.items()})
    return models


def log_clients(session: Session, listeners: Listeners, results: Results) -> None:
    """The picture of the partition; each client's modules, and its samples, beside real images if these may be seen."""
    partition, class_names = session.partition, session.info.class_names
    session.run.figure(plots.partition_plot(partition.matrix(), partition.clients, class_names), "partition.png")
    cards = [handle.card for handle in results.modules.values()]
    real = results.tested.examples if session.config.shows_real else {}
    for client in partition.clients:
        drawn = {label: images for (c, label), images in results.shown.items() if c == client}
        grid = plots.sample_grid(drawn, real, class_names, client) if drawn else None
        listeners.client(client).finish([card for card in cards if card.client == client], grid)


def log_evaluation(session: Session, result: TestResult) -> None:
    """Figures and confusion matrices of all classifiers, figures of every lone expert, differences."""
    evaluation_run = session.run.child("evaluation")
    for method, judged in result.evaluations.items():
        evaluation_run.metrics({f"{method}/{k}": v for k, v in judged.scalars().items()})
        title = f"{method}, announced prior: accuracy {judged.announced.accuracy.value:.3f}"
        picture = plots.confusion_plot(judged.announced.confusion, session.info.class_names, title)
        evaluation_run.figure(picture, f"confusion-{method}.png")
    for client, judged in result.experts.items():
        evaluation_run.metrics({f"expert/{client}/{k}": v for k, v in judged.scalars().items()})
    if result.experts:
        lone = [judged.announced.accuracy.value for judged in result.experts.values()]
        evaluation_run.metrics({"experts": len(lone), f"expert_mean/{ANNOUNCED}/accuracy": float(np.mean(lone))})
    for ours, gained in result.differences.items():
        for method, difference in gained.items():
            evaluation_run.metrics({f"{ours}_less_{method}/{k}": v for k, v in difference.scalars().items()})
    evaluation_run.end()


def log_models(session: Session, results: Results) -> dict[str, str]:
    """The classifier of Architecture I and the product of Architecture II, each as one model; returns their URIs."""
    from fedfactory_ray.classification.ensemble import Predictor
    from fedfactory_ray.classification.prediction import load_network

    run, experts, names, tested = session.run, results.experts, session.info.class_names, results.tested
    examples, models = results.some_drawn(), {}

    def log(name: str, method: str, folders: list[str], made_of: Mapping[str, object]) -> None:
        networks = [load_network(session.config, session.info.task, session.storage, folder) for folder in folders]
        temperature = tested.evaluations[method].temperature
        told = {**made_of, "temperature": temperature, "prior": tested.prior.tolist()}
        models[name] = run.model(name, Predictor(networks, temperature), examples, names, tested.prior, told)

    if METHOD in results.classifiers:
        classifier = results.classifiers[METHOD]
        log("classifier", METHOD, [classifier.folder], {"sha256": classifier.sha256})
    if experts:
        digests = {client: expert.sha256 for client, expert in experts.fitted.items()}
        made_of = {"experts": digests, "missing": experts.missing}
        log("ensemble", PRODUCT, list(experts.folders.values()), made_of)
    return models
