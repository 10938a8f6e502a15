"""The comparison's work: every method on one partition; the test split is read once, after all are done."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
import ray
from rich.console import Console

from fedfactory_ray.comparison.report import (
    BEST,
    COMPARED,
    ENSEMBLE,
    FACTORY,
    FACTORY_II,
    LONE,
    MEAN,
    Comparison,
    Line,
    comparison_table,
    draw,
    log_comparison,
    over_seeds,
)
from fedfactory_ray.errors import ConfigError
from fedfactory_ray.pipeline import phases as pipeline
from fedfactory_ray.pipeline.report import partition_table
from fedfactory_ray.pipeline.session import Session, open_session
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.layout import CENTRALISED, LOCAL, PLOT, PRODUCT, TABLE
from fedfactory_ray.tracking import runs as tracking
from fedfactory_ray.tracking.progress import bars
from fedfactory_ray.tracking.runs import ClientRun, Run

if TYPE_CHECKING:
    from fedfactory_ray.baselines.rounds import Federated, Federation, Round
    from fedfactory_ray.classification.evaluation import Difference
    from fedfactory_ray.federation.experts import Experts
    from fedfactory_ray.generation.card import Modules
    from fedfactory_ray.synthesis.shard import Shard


def method_names() -> list[str]:
    """All methods, in the order of the table."""
    from fedfactory_ray.baselines.methods import METHODS

    return [CENTRALISED, LOCAL, *METHODS, FACTORY, FACTORY_II]


def compare(config: Config, methods: Sequence[str], seeds: int, console: Console) -> Comparison:
    """Compare `methods` on `seeds` seeds, from the config's on; partitions and generators are new for each.

    Each seed's run is that of `jobs/run.py`, so what either has done is not done again. Raises FedFactoryError for
    what the user can mend.
    """
    unknown = sorted(set(methods) - set(method_names()))
    if unknown:
        raise ConfigError([f"methods: {', '.join(unknown)} unknown: choose of {', '.join(method_names())}"])
    if config.modules is not None:
        raise ConfigError(["modules from files: the other methods need their clients in this cluster"])
    if config.apart and CENTRALISED in methods:
        others = " ".join(method for method in method_names() if method != CENTRALISED)
        raise ConfigError([f"partition natural: centralised needs all images in one place; try --methods {others}"])
    if seeds < 1:
        raise ConfigError([f"seeds: found {seeds}, needed at least 1"])
    found = []
    for seed in range(config.seed, config.seed + seeds):
        name = f"{config.name}-seed{seed}" if config.name and seeds > 1 else config.name
        found.append(compare_once(config.model_copy(update={"seed": seed, "name": name}), methods, console))
        console.print(comparison_table(found[-1]))
    if seeds == 1:
        return found[0]
    whole = over_seeds(found)
    run = tracking.start_run(config, whole.name, whole.storage)
    log_comparison(run, {line.method: run.child(line.method) for line in whole.lines}, whole)
    run.end()
    return whole


def compare_once(config: Config, methods: Sequence[str], console: Console) -> Comparison:
    """The comparison on the config's seed, logged as one MLflow run with a child for each method."""
    draws = FACTORY in methods or FACTORY_II in methods
    with open_session(config, console, draws=draws) as session, ExitStack() as ending:
        console.print(partition_table(session.partition, session.info))
        folders: dict[str, str] = {}
        lines: dict[str, Line] = {}
        runs = {method: session.run.child(method) for method in method_names() if method in methods}
        federated = [method for method in runs if method not in (FACTORY, FACTORY_II, CENTRALISED, LOCAL)]
        if federated or LOCAL in methods:
            from fedfactory_ray.baselines.rounds import Federation, check

            check(config, session.partition)
        if federated and config.classifier.norm == "batch":
            console.print("note: statistics of batch norms are averaged too; --classifier.norm group has none")
        experts = None
        if draws:
            modules, manifest = make_images(session)
            if FACTORY in methods:
                lines[FACTORY], folders[FACTORY] = run_factory(session, modules, manifest)
            if FACTORY_II in methods:
                lines[FACTORY_II], experts = run_experts(session, modules, manifest)
        if CENTRALISED in methods:
            lines[CENTRALISED], folders[CENTRALISED] = run_centralised(session)
        curves, alone, diverged = {}, [], []
        if federated or LOCAL in methods:
            federation = ending.enter_context(
                Federation(config, session.partition, pipeline.make_task(session), session.plan.client, session.storage)
            )
            if LOCAL in methods:
                alone = run_local(session, federation, folders)
            for method in federated:
                done = run_federated(session, federation, method, runs[method])
                lines[method], folders[method] = federated_line(method, done.history), done.folder
                curves[method] = [r.validation_accuracy for r in done.history]
                diverged += [] if done.chosen else [method]
            ending.close()  # its actors make room for the test
        scores, difference = evaluate(session, folders, alone, experts)
        seconds = session.worked
        if LOCAL in methods:
            sent = sum(session.storage.size(f"{folders[name]}/model.safetensors") for name in alone)
            moved = {MEAN: 0, BEST: 0, ENSEMBLE: sent}
            lines |= {name: Line(name, {}, None, up, 0, seconds["local"]) for name, up in moved.items()}
        if experts is not None:
            lines[LONE] = replace(lines[FACTORY_II], method=LONE)
        order = [CENTRALISED, MEAN, BEST, ENSEMBLE, *federated, FACTORY, LONE, FACTORY_II]
        found = [replace(lines[name], scores=scores[name]) for name in order if name in lines]
        missing = tuple(experts.missing) if experts else ()
        gained = (difference,) if difference else ()
        comparison = Comparison(session.name, session.storage.uri, found, curves, missing, tuple(diverged), gained)
        session.storage.write_json(TABLE, comparison.to_json())
        picture = BytesIO()
        draw(comparison).savefig(picture, format="png")
        session.storage.write(PLOT, picture.getvalue())
        log_comparison(session.run, {ENSEMBLE: runs[LOCAL], **runs} if LOCAL in runs else runs, comparison)
    return comparison


def make_images(session: Session) -> tuple[Modules, list[Shard]]:
    """The modules and the synthetic data set that both architectures share."""
    client_runs: dict[str, ClientRun] = {}
    modules = pipeline.train_modules(session, client_runs)
    for client_run in client_runs.values():
        client_run.run.end()
    return modules, pipeline.draw_images(session, modules)


def run_factory(session: Session, modules: Modules, manifest: list[Shard]) -> tuple[Line, str]:
    """FederatedFactory's Architecture I, as `jobs/run.py` runs it."""
    rows = pipeline.synthetic_rows(session, manifest)
    classifier = pipeline.fit_classifier(session, FACTORY, rows, pipeline.make_task(session))
    seconds = sum(session.worked[phase] for phase in ("modules", "synthesis", f"classifier ({FACTORY})"))
    return Line(FACTORY, {}, 1, pipeline.uploaded_bytes(modules), 0, seconds), classifier.folder


def run_experts(session: Session, modules: Modules, manifest: list[Shard]) -> tuple[Line, Experts]:
    """FederatedFactory's Architecture II: up go modules and experts, down the other clients' modules."""
    experts = pipeline.fit_experts(session, modules, manifest, pipeline.make_task(session))
    weights = pipeline.expert_bytes(session, experts)
    seconds = sum(session.worked[phase] for phase in ("modules", "synthesis", "experts"))
    return Line(FACTORY_II, {}, 1, pipeline.uploaded_bytes(modules) + weights, experts.downlink_bytes, seconds), experts


def run_centralised(session: Session) -> tuple[Line, str]:
    """The classifier on all real images, which would all have to be uploaded."""
    task = pipeline.make_task(session)
    classifier = pipeline.fit_centralised(session, task)
    image_bytes = sum(len(share) for _, _, share in session.partition) * int(np.prod(task.image_shape))
    seconds = session.worked[f"classifier ({CENTRALISED})"]
    return Line(CENTRALISED, {}, None, image_bytes, 0, seconds), classifier.folder


def run_local(session: Session, federation: Federation, folders: dict[str, str]) -> list[str]:
    """Every client alone; adds their classifiers to `folders` and returns their names there."""
    from fedfactory_ray.baselines.alone import fit_alone

    total = len(session.partition.clients)
    with session.phase("local"), bars(session.console, "fitting each client alone", total, "clients") as shown:
        fitted = fit_alone(federation, shown.update)
        shown.update(total)
    names = {f"local-{alone.client}": alone.folder for alone in fitted}
    folders |= names
    return list(names)


def run_federated(session: Session, federation: Federation, method: str, run: Run) -> Federated:
    """A federated method; its curves are logged as they grow."""
    from fedfactory_ray.baselines.methods import METHODS

    config, logged = session.config.federated, set()

    def log(done: Round) -> None:
        logged.add(done.round)
        run.grow((name, done.round, value) for name, value in vars(done).items() if name != "round")

    with session.phase(method), bars(session.console, method, config.rounds, "rounds") as shown:

        def on_round(done: Round) -> None:
            shown.update(done.round, f"validation accuracy {done.validation_accuracy:.3f}")
            log(done)

        finished = federation.run(method, METHODS[method](config), on_round)
    for done in finished.history:
        if done.round not in logged:  # of an earlier start of the run
            log(done)
    run.flush()
    run.metrics({"chosen_round": finished.chosen})
    run.tag("sha256", finished.sha256)
    return finished


def federated_line(method: str, history: Sequence[Round]) -> Line:
    """Costs of all rounds, those after the chosen one too: nobody knew that they would not help."""
    up, down, seconds = (sum(getattr(r, name) for r in history) for name in ("bytes_up", "bytes_down", "seconds"))
    return Line(method, {}, len(history), up, down, seconds)


def evaluate(
    session: Session, folders: dict[str, str], alone: list[str], experts: Experts | None
) -> tuple[dict[str, dict[str, float]], Difference | None]:
    """Scores by line of the table, and what Architecture II gains on I; the test split is read here, once."""
    from fedfactory_ray.classification.prediction import TestResult, evaluate_on_test

    worker = session.plan.classifier
    with session.phase("evaluation"):
        result: TestResult = ray.get(
            evaluate_on_test.options(num_cpus=worker.num_cpus, num_gpus=worker.num_gpus).remote(
                session.config,
                pipeline.make_task(session),
                worker.resources,
                session.storage,
                folders,
                experts.folders if experts else {},
                1,
                {ENSEMBLE: alone} if alone else {},
            )
        )
    scores = {name: evaluation.scalars() for name, evaluation in result.evaluations.items()}
    if alone:
        ranked = sorted((scores.pop(name) for name in alone), key=lambda each: each["accuracy"])
        scores[BEST] = ranked[-1]
        scores[MEAN] = mean(ranked)
    if experts:
        scores[FACTORY_II] = scores[PRODUCT]
        scores[LONE] = mean([evaluation.scalars() for evaluation in result.experts.values()])
    return scores, result.differences.get(FACTORY)


def mean(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each of the compared scores."""
    return {score: float(np.mean([each[score] for each in scores])) for score in COMPARED}
