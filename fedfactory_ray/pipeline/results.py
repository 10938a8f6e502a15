"""What a finished run tells: pictures, figures and models in MLflow."""

from __future__ import annotations

import json

import numpy as np
from torch import nn

from fedfactory_ray.classification.prediction import TestResult
from fedfactory_ray.classification.training import Classifier
from fedfactory_ray.data.source import Task
from fedfactory_ray.federation.experts import Experts
from fedfactory_ray.generation.card import Modules
from fedfactory_ray.pipeline.session import Session
from fedfactory_ray.storage.layout import METHOD
from fedfactory_ray.synthesis.shard import Shard
from fedfactory_ray.tracking import plots
from fedfactory_ray.tracking.runs import ClientRun


def uploaded_bytes(modules: Modules) -> int:
    """Bytes of all uploads: weights and cards."""
    return sum(handle.card.upload_bytes for handle in modules.values())


def expert_bytes(session: Session, experts: Experts) -> int:
    """Bytes of the fitted experts' weights, which the product needs in one place."""
    return sum(session.storage.size(f"{folder}/model.safetensors") for folder in experts.folders.values())


def log_results(
    session: Session,
    task: Task,
    modules: Modules,
    manifest: list[Shard],
    classifiers: dict[str, Classifier],
    experts: Experts | None,
    result: TestResult,
    drawn: dict[tuple[str, int], np.ndarray],
    client_runs: dict[str, ClientRun],
) -> dict[str, str]:
    """The driver logs what there is to see; returns the URIs of the logged models by name."""
    run, partition, class_names = session.run, session.partition, session.info.class_names
    with session.phase("logging"):
        run.figure(plots.partition_plot(partition.matrix(), partition.clients, class_names), "partition.png")
        cards = [handle.card for handle in modules.values()]
        for client in partition.clients:
            synthetic = {label: images for (c, label), images in drawn.items() if c == client}
            client_runs.setdefault(client, ClientRun(session.logged, client)).finish(
                [card for card in cards if card.client == client],
                plots.sample_grid(synthetic, result.examples, class_names, client) if synthetic else None,
            )
        images = sum(shard.n for shard in manifest)
        log_evaluation(session, result)
        run.json(json.loads(session.storage.read("partition.json")), "partition.json")
        run.json([vars(card) for card in cards], "modules.json")
        models = log_models(session, task, classifiers, experts, np.concatenate(list(result.examples.values())))
        run.metrics(result.evaluations[session.config.main_method].scalars())
        run.metrics({"uploaded_bytes": uploaded_bytes(modules)})
        if experts:
            moved = {"downlink_bytes": experts.downlink_bytes, "expert_bytes": expert_bytes(session, experts)}
            run.metrics(moved)
        run.metrics({"synthetic_images": images, "modules": len(modules)})
    run.metrics({f"seconds/{k}".replace("(", "").replace(")", ""): v for k, v in session.seconds.items()})
    return models


def log_evaluation(session: Session, result: TestResult) -> None:
    """Figures and confusion matrices of all classifiers, figures of every lone expert, differences to the product."""
    evaluation_run = session.run.child("evaluation")
    for method, evaluation in result.evaluations.items():
        evaluation_run.metrics({f"{method}/{k}": v for k, v in evaluation.scalars().items()})
        title = f"{method}: accuracy {evaluation.accuracy.value:.3f}"
        picture = plots.confusion_plot(evaluation.confusion, session.info.class_names, title)
        evaluation_run.figure(picture, f"confusion-{method}.png")
    for client, evaluation in result.experts.items():
        evaluation_run.metrics({f"expert/{client}/{k}": v for k, v in evaluation.scalars().items()})
    if result.experts:
        lone = [evaluation.accuracy.value for evaluation in result.experts.values()]
        evaluation_run.metrics({"experts": len(lone), "expert_mean/accuracy": float(np.mean(lone))})
    for method, difference in result.differences.items():
        evaluation_run.metrics({f"product_less_{method}/{k}": v for k, v in difference.scalars().items()})
    evaluation_run.end()


def log_models(
    session: Session, task: Task, classifiers: dict[str, Classifier], experts: Experts | None, examples: np.ndarray
) -> dict[str, str]:
    """The classifier of Architecture I and the product of Architecture II, each as one model; returns their URIs."""
    from fedfactory_ray.classification.ensemble import Ensemble, Predictor
    from fedfactory_ray.classification.prediction import load_network

    run, models = session.run, {}

    def load(folder: str) -> nn.Module:
        return load_network(session.config, task, session.storage, folder)

    if METHOD in classifiers:
        predictor = Predictor(load(classifiers[METHOD].folder))
        models["classifier"] = run.model("classifier", predictor, examples, {"sha256": classifiers[METHOD].sha256})
    if experts:
        ensemble = Ensemble(load(expert.folder) for expert in experts.fitted.values())
        digests = {client: expert.sha256 for client, expert in experts.fitted.items()}
        models["ensemble"] = run.model("ensemble", ensemble, examples, {"experts": digests, "missing": experts.missing})
    return models
