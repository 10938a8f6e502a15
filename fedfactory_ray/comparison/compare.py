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
    ACCURACY,
    BEST,
    COMPARED,
    ENSEMBLE,
    FACTORY,
    FACTORY_II,
    LONE,
    MEAN,
    PAIRS,
    Comparison,
    MethodLine,
    comparison_table,
    draw,
    log_comparison,
    over_seeds,
)
from fedfactory_ray.errors import ConfigError
from fedfactory_ray.generation.divergence import read_divergences
from fedfactory_ray.pipeline import phases
from fedfactory_ray.pipeline.listeners import FederatedListener, Listeners
from fedfactory_ray.pipeline.report import partition_table
from fedfactory_ray.pipeline.results import expert_bytes, uploaded_bytes
from fedfactory_ray.pipeline.seeds import each_seed
from fedfactory_ray.pipeline.session import Session, open_session
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.layout import CENTRALISED, LOCAL, PLOT, PRODUCT, TABLE, WEIGHTS, lone_classifier
from fedfactory_ray.tracking import runs as tracking
from fedfactory_ray.tracking.progress import Bars
from fedfactory_ray.tracking.runs import Run

if TYPE_CHECKING:
    from fedfactory_ray.baselines.card import Federated, Round
    from fedfactory_ray.baselines.rounds import Federation
    from fedfactory_ray.classification.evaluation import Difference
    from fedfactory_ray.classification.prediction import Entry, TestResult
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
    found = []
    for one in each_seed(config, seeds):
        found.append(compare_once(one, methods, console))
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
    from fedfactory_ray.classification.prediction import Entry

    draws = FACTORY in methods or FACTORY_II in methods
    with open_session(config, console, draws=draws) as session, ExitStack() as ending:
        config = session.config
        console.print(partition_table(session.partition, session.info, config.generator.min_images))
        entries: dict[str, Entry] = {}
        lines: dict[str, MethodLine] = {}
        runs = {method: session.run.child(method) for method in method_names() if method in methods}
        federated = [method for method in runs if method not in (FACTORY, FACTORY_II, CENTRALISED, LOCAL)]
        if federated or LOCAL in methods:
            from fedfactory_ray.baselines.rounds import Federation, check

            check(config, session.partition)
        if federated and config.classifier.norm == "batch":
            console.print("note: statistics of batch norms are averaged too; --classifier.norm group has none")
        manifest: list[Shard] = []
        experts, listeners = None, Listeners(console, session.logged)
        if draws:
            modules = phases.train_modules(session, listeners)
            listeners.end_clients()
            manifest = phases.draw_data_set(session, listeners, modules)
            if FACTORY in methods:
                lines[FACTORY], entries[FACTORY] = run_factory(session, listeners, modules, manifest)
            if FACTORY_II in methods:
                lines[FACTORY_II], experts = run_experts(session, listeners, modules, manifest)
        if CENTRALISED in methods:
            lines[CENTRALISED], entries[CENTRALISED] = run_centralised(session, listeners)
        curves, alone, diverged = {}, [], []
        if federated or LOCAL in methods:
            federation = ending.enter_context(
                Federation(config, session.partition, session.info.task, session.plan.client, session.storage)
            )
            if LOCAL in methods:
                alone = run_local(session, federation, entries)
            for method in federated:
                done = run_federated(session, listeners, federation, method, runs[method])
                lines[method] = federated_line(method, done.history)
                entries[method] = Entry(done.folder, phases.held_counts(session))
                curves[method] = [r.validation_accuracy for r in done.history]
                diverged += [] if done.chosen else [method]
            ending.close()  # its actors make room for the test
        scores, gained = score_methods(session, entries, alone, experts, manifest)
        seconds = session.worked
        if LOCAL in methods:
            sent = sum(session.storage.size(f"{entries[name].folder}/{WEIGHTS}") for name in alone)
            moved = {MEAN: 0, BEST: 0, ENSEMBLE: sent}
            lines |= {name: MethodLine(name, {}, None, up, 0, seconds["local"]) for name, up in moved.items()}
        if experts is not None:
            lines[LONE] = replace(lines[FACTORY_II], method=LONE)
        order = [CENTRALISED, MEAN, BEST, ENSEMBLE, *federated, FACTORY, LONE, FACTORY_II]
        found = [replace(lines[name], scores=scores[name]) for name in order if name in lines]
        missing = tuple(experts.missing) if experts else ()
        left_out = tuple(map(str, read_divergences(session.storage))) if draws else ()
        comparison = Comparison(
            *(session.name, session.storage.uri, found, curves, missing, tuple(diverged), gained), left_out=left_out
        )
        session.storage.write_json(TABLE, comparison.to_json())
        picture = BytesIO()
        draw(comparison).savefig(picture, format="png")
        session.storage.write(PLOT, picture.getvalue())
        log_comparison(session.run, {ENSEMBLE: runs[LOCAL], **runs} if LOCAL in runs else runs, comparison)
    return comparison


def run_factory(
    session: Session, listeners: Listeners, modules: Modules, manifest: list[Shard]
) -> tuple[MethodLine, Entry]:
    """FederatedFactory's Architecture I, as `jobs/run.py` runs it."""
    rows = phases.synthetic_rows(session, manifest)
    classifier = phases.fit_classifier(session, listeners, FACTORY, session.config, rows)
    seconds = sum(session.worked[phase] for phase in ("modules", "synthesis", f"classifier ({FACTORY})"))
    entry = phases.factory_entry(session, manifest, classifier.folder)
    return MethodLine(FACTORY, {}, 1, uploaded_bytes(modules), 0, seconds), entry


def run_experts(
    session: Session, listeners: Listeners, modules: Modules, manifest: list[Shard]
) -> tuple[MethodLine, Experts]:
    """FederatedFactory's Architecture II: up go modules and experts, down the other clients' modules."""
    experts = phases.fit_experts(session, listeners, modules, manifest)
    up = uploaded_bytes(modules) + expert_bytes(session, experts)
    seconds = sum(session.worked[phase] for phase in ("modules", "synthesis", "experts"))
    return MethodLine(FACTORY_II, {}, 1, up, experts.downlink_bytes, seconds), experts


def run_centralised(session: Session, listeners: Listeners) -> tuple[MethodLine, Entry]:
    """The classifier on all real images, which would all have to be uploaded."""
    classifier = phases.fit_centralised(session, listeners)
    image_bytes = sum(len(share) for _, _, share in session.partition) * int(np.prod(session.info.task.image_shape))
    seconds = session.worked[f"classifier ({CENTRALISED})"]
    entry = phases.reference_entry(session, classifier.folder)
    return MethodLine(CENTRALISED, {}, None, image_bytes, 0, seconds), entry


def run_local(session: Session, federation: Federation, entries: dict[str, Entry]) -> list[str]:
    """Every client alone; adds their classifiers to `entries` and returns their names there."""
    from fedfactory_ray.baselines.alone import fit_alone
    from fedfactory_ray.classification.prediction import Entry

    total = len(session.partition.clients)
    with session.phase("local"), Bars(session.console, "fitting each client alone", total, "clients") as shown:
        fitted = fit_alone(federation, shown.update)
        shown.update(total)
    counts = dict(zip(session.partition.clients, session.partition.matrix(), strict=True))
    names = {lone_classifier(alone.client): Entry(alone.folder, counts[alone.client]) for alone in fitted}
    entries |= names
    return list(names)


def run_federated(session: Session, listeners: Listeners, federation: Federation, method: str, run: Run) -> Federated:
    """A federated method; its curves are logged as they grow."""
    from fedfactory_ray.baselines.methods import METHODS

    config = session.config.federated
    with session.phase(method), FederatedListener(listeners, method, run, config.rounds) as listen:
        finished = federation.run(method, METHODS[method](config), listen)
    listen.finish(finished)
    return finished


def federated_line(method: str, history: Sequence[Round]) -> MethodLine:
    """Costs of all rounds, also of those after the chosen one: they had to be run to know."""
    up, down, seconds = (sum(getattr(r, name) for r in history) for name in ("bytes_up", "bytes_down", "seconds"))
    return MethodLine(method, {}, len(history), up, down, seconds)


def score_methods(
    session: Session,
    entries: dict[str, Entry],
    alone: list[str],
    experts: Experts | None,
    manifest: list[Shard],
) -> tuple[dict[str, dict[str, float]], dict[str, Difference]]:
    """Scores by line of the table, and differences by name; the test split is read here, once."""
    with session.phase("evaluation"):
        ensembles = {ENSEMBLE: alone} if alone else {}
        asked = phases.read_test_split(session, entries, experts, manifest, examples=0, ensembles=ensembles)
        result: TestResult = ray.get(asked)
    scores = {name: judged.scalars() for name, judged in result.evaluations.items()}
    if alone:
        ranked = sorted((scores.pop(name) for name in alone), key=lambda each: each[ACCURACY])
        scores[BEST] = ranked[-1]
        scores[MEAN] = mean(ranked)
    if experts:
        scores[FACTORY_II] = scores[PRODUCT]
        scores[LONE] = mean([judged.scalars() for judged in result.experts.values()])
    names = {FACTORY_II: PRODUCT}
    gained = {
        f"{first} less {second}": result.differences[names.get(first, first)][second]
        for first, second in PAIRS
        if second in result.differences.get(names.get(first, first), {})
    }
    return scores, gained


def mean(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each of the compared scores."""
    return {score: float(np.mean([each[score] for each in scores])) for score in COMPARED}
