"""The main job: partition → modules → synthetic images → classifier, experts → evaluation, logged as it goes.

Phases import what loads torch when they need it: clients are at work before the driver has it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import count, takewhile
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import ray
from rich.console import Console

from fedfactory_ray.baselines.centralised import real_rows, real_validation_rows, reference_config
from fedfactory_ray.classification.rows import Rows, shard_rows, validation_rows
from fedfactory_ray.federation.round import run_round
from fedfactory_ray.generation.card import ModuleHandle, Modules
from fedfactory_ray.generation.divergence import read_divergences
from fedfactory_ray.pipeline.listeners import (
    ClassifierListener,
    ExpertsListener,
    Listeners,
    ModulesListener,
    SynthesisListener,
)
from fedfactory_ray.pipeline.report import Report, partition_table
from fedfactory_ray.pipeline.results import Results, log_results, make_report
from fedfactory_ray.pipeline.session import Session, open_session
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.layout import CENTRALISED, ENVIRONMENT, EVALUATION, METHOD, module_folder, unit_file
from fedfactory_ray.synthesis.previews import previews
from fedfactory_ray.synthesis.shard import Shard, manifest_digest
from fedfactory_ray.synthesis.synthesize import synthesize
from fedfactory_ray.tracking import plots

if TYPE_CHECKING:
    from fedfactory_ray.classification.card import Classifier
    from fedfactory_ray.classification.prediction import Entry, TestResult
    from fedfactory_ray.federation.experts import Experts


log = logging.getLogger(__name__)


def run(config: Config, console: Console) -> Report:
    """Run FederatedFactory as configured, or go on where an earlier start of the same run stopped.

    Architecture I fits one classifier on the synthetic images, Architecture II an expert a client; both from the same.

    Raises FedFactoryError for what the user can mend; then nothing was trained.
    """
    with open_session(config, console) as session:
        console.print(partition_table(session.partition, session.info, config.generator.min_images))
        report = run_phases(session, Listeners(console, session.logged))
    return report


def run_phases(session: Session, listeners: Listeners) -> Report:
    """All phases in an open session; what stands in its storage and verifies is not made again."""
    config = session.config
    modules = train_modules(session, listeners)
    manifest = draw_data_set(session, listeners, modules)
    classifiers = {}
    if config.architecture != "decentralised":
        classifiers[METHOD] = fit_classifier(session, listeners, METHOD, config, synthetic_rows(session, manifest))
    if CENTRALISED in config.references:
        classifiers[CENTRALISED] = fit_centralised(session, listeners)
    experts = None if config.architecture == "centralised" else fit_experts(session, listeners, modules, manifest)
    tested, shown = evaluate_all(session, manifest, classifiers, experts)
    results = Results(modules, manifest, classifiers, experts, tested, shown)
    models = log_results(session, listeners, results)
    return make_report(session, results, models)


def train_modules(session: Session, listeners: Listeners) -> Modules:
    """Every client trains its modules, of classes of which it holds enough images, and uploads each once; those from
    files are there already."""
    config, partition = session.config, session.offered
    if config.modules is not None:
        return {card.key: ModuleHandle(card) for card in session.cards}
    take_back(session)
    steps = sum(config.generator.steps(len(indices)) for _, _, indices in partition)
    with session.phase("modules"), ModulesListener(listeners, steps) as listen:
        modules = run_round(config, partition, session.plan.client, session.storage, listen)
        listen.update(steps)
    offered = {label for _, label in modules}
    absent = sorted({label for _, label, _ in partition} - offered)
    if absent:
        names = ", ".join(session.info.class_names[label] for label in absent)
        log.warning("no module of class %s is left: no image of it is drawn", names)
    return modules


def take_back(session: Session) -> None:
    """Delete what earlier versions made of shares that train no module now: modules, and the units drawn from them."""
    for client, label, _ in session.partition.at_home(session.config.generator.min_images):
        session.storage.delete_folder(module_folder(client, label))
        units = (unit_file(client, label, index) for index in count())
        for unit in takewhile(session.storage.exists, units):
            session.storage.delete(unit)


def draw_data_set(session: Session, listeners: Listeners, modules: Modules) -> list[Shard]:
    """A class-balanced data set is drawn from the modules."""
    n_images = session.config.synthesis.images_per_class * len({label for _, label in modules})
    with session.phase("synthesis"), SynthesisListener(listeners, n_images) as listen:
        manifest = synthesize(session.config, modules, session.plan.synthesis, session.storage, listen)
    listen.finish(manifest, session.seconds["synthesis"])
    return manifest


def synthetic_rows(session: Session, manifest: list[Shard]) -> Rows:
    """The drawn images as a classifier's rows."""
    return shard_rows(session.storage, manifest, manifest_digest(manifest), session.config.synthesis.unit_size)


def fit_classifier(session: Session, listeners: Listeners, method: str, config: Config, rows: Rows) -> Classifier:
    """A method's classifier is fitted by the recipe of `config`, the session's or one made of it."""
    from fedfactory_ray.classification.training import fit

    epochs = config.classifier.epochs
    with session.phase(f"classifier ({method})"), ClassifierListener(listeners, method, epochs) as listen:
        classifier = fit(config, rows, session.info.task, session.plan.classifier, session.storage, method, listen)
    listen.finish(classifier, rows.n_images)
    return classifier


def fit_centralised(session: Session, listeners: Listeners) -> Classifier:
    """The reference: the same classifier by the same recipe on all real images, for no fewer optimiser steps."""
    rows = real_rows(session.config, session.partition, session.info)
    longer = reference_config(session.config, session.partition)
    return fit_classifier(session, listeners, CENTRALISED, longer, rows)


def fit_experts(session: Session, listeners: Listeners, modules: Modules, manifest: list[Shard]) -> Experts:
    """Every client fits its expert, side by side."""
    from fedfactory_ray.federation.expert import assign
    from fedfactory_ray.federation.experts import collect_experts

    config, partition, task = session.config, session.partition, session.info.task
    cards = [handle.card for handle in modules.values()]
    assignments = [assign(config, client, partition, manifest, cards, task) for client in partition.clients]
    epochs = config.classifier.epochs
    with session.phase("experts"), ExpertsListener(listeners, len(assignments), epochs) as listen:
        experts = collect_experts(config, assignments, session.plan.client, session.storage, listen)
    listen.finish(experts)
    return experts


def factory_entry(session: Session, manifest: list[Shard], folder: str) -> Entry:
    """The factory's classifier in `folder`, to be evaluated: calibrated on the synthetic rows that validate."""
    from fedfactory_ray.classification.prediction import Entry

    return Entry(folder, validation=synthetic_validation(session, manifest))


def synthetic_validation(session: Session, manifest: list[Shard]) -> Callable[[], pa.Table]:
    """What reads the synthetic rows that validate."""
    config = session.config
    fraction = config.classifier.validation_fraction
    return validation_rows(session.storage, manifest, config.synthesis.unit_size, fraction)


def reference_entry(session: Session, folder: str) -> Entry:
    """The reference in `folder`, to be evaluated: trained on the classes as they are, calibrated on the real training
    images that validate."""
    from fedfactory_ray.classification.prediction import Entry

    return Entry(folder, held_counts(session), real_validation_rows(session.config, session.partition))


def announced_counts(session: Session) -> np.ndarray:
    """Images of each class, int64 (classes,), that the clients who are left declare: their modules' cards do."""
    left_out = {note.key for note in read_divergences(session.storage)}
    counts = np.zeros(session.info.classes, dtype=np.int64)
    for client, label, indices in session.offered:
        counts[label] += len(indices) * ((client, label) not in left_out)
    return counts


def held_counts(session: Session) -> np.ndarray:
    """Images of each class, int64 (classes,), that the clients who are left hold, those that train no module too."""
    return np.asarray(session.partition.matrix().sum(0))


def evaluate_all(
    session: Session, manifest: list[Shard], classifiers: dict[str, Classifier], experts: Experts | None
) -> tuple[TestResult, dict[tuple[str, int], np.ndarray]]:
    """The test split is read once, for all classifiers and experts; some images of each module come along."""
    with session.phase("evaluation"):
        entries = {
            method: reference_entry(session, each.folder)
            if method == CENTRALISED
            else factory_entry(session, manifest, each.folder)
            for method, each in classifiers.items()
        }
        examples = plots.GRID_COLUMNS if session.config.shows_real else 0
        result = read_test_split(session, entries, experts, manifest, examples=examples)
        drawn = previews.remote(session.storage, manifest, session.info.task.image_shape, plots.GRID_COLUMNS)
        tested, shown = ray.get([result, drawn])
    figures: dict[str, object] = {m: judged.scalars() for m, judged in tested.evaluations.items()}
    if experts:
        figures["experts"] = {client: judged.scalars() for client, judged in tested.experts.items()}
        figures["missing_experts"] = experts.missing
    left_out = read_divergences(session.storage)
    if left_out:
        figures["left_out"] = [note.to_tree() for note in left_out]
    for ours, gained in tested.differences.items():
        figures[f"{ours}_less"] = {method: difference.scalars() for method, difference in gained.items()}
    figures |= {"prior": tested.prior.tolist(), "predictions_sha256": tested.digests}
    known = session.storage.read_again(ENVIRONMENT, [])
    if session.storage.exists(ENVIRONMENT) and not known:
        known = [{"earlier starts": "unknown"}]  # the file was damaged: jobs/unlearn.py then doubts
    session.storage.write_json(ENVIRONMENT, known + [tested.environment] * (tested.environment not in known))
    session.storage.write_json(EVALUATION, figures)
    return tested, shown


def read_test_split(
    session: Session,
    entries: dict[str, Entry],
    experts: Experts | None,
    manifest: list[Shard],
    *,
    examples: int,
    ensembles: dict[str, list[str]] | None = None,
) -> ray.ObjectRef:
    """A reference to the TestResult of classifiers and experts, see `evaluate_on_test`."""
    from fedfactory_ray.classification.prediction import evaluate_on_test

    worker, retries = session.plan.classifier, session.config.resources.attempts - 1
    return evaluate_on_test.options(**worker.options, max_retries=retries).remote(
        session.config,
        session.info.task,
        worker.threads,
        session.storage,
        announced_counts(session),
        entries,
        experts.folders if experts else {},
        synthetic_validation(session, manifest) if experts else None,
        examples,
        ensembles,
    )
