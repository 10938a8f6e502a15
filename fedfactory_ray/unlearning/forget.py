"""Forgetting: a new run without the client, of what the old one had and need not make again; then the old one goes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import ray
from rich.console import Console

from fedfactory_ray import pipeline, plots, tracking
from fedfactory_ray.cluster import connect, make_plan
from fedfactory_ray.config import Config, merge
from fedfactory_ray.errors import UnlearningError
from fedfactory_ray.sections import WorkerResources
from fedfactory_ray.session import FORGETTING, FORGOTTEN, Session, open_session, refuse_forgotten
from fedfactory_ray.storage import Storage
from fedfactory_ray.unlearning.certificate import CERTIFICATE, Certificate, audit_lines, cost, note, what_went
from fedfactory_ray.unlearning.deletion import delete_run, delete_traces, find_traces
from fedfactory_ray.unlearning.facts import Facts, read_facts, refuse_damaged
from fedfactory_ray.unlearning.request import Request, make_request
from fedfactory_ray.unlearning.reuse import copy_files, plan_reuse
from fedfactory_ray.unlearning.verification import residue


def forget(
    config: Config,
    clients: Sequence[str],
    classes: Sequence[int],
    successor: str | None,
    asked_by: str,
    allow_inexact: bool,
    console: Console,
) -> Certificate:
    """Make of the finished run of `config` one without `clients` (or without `classes` of theirs), and delete the old.

    Steps: (1) check the old run and note the request in the new one's folder; (2) copy what did not depend on the
    clients; (3) run all phases, which make what is missing; (4) leave a note in the old run, which is refused from then
    on; (5) delete it, and what MLflow has of it; (6) certificate and audit lines. The same call goes on after step 1
    from wherever it was stopped; after step 6 it returns the certificate. Raises UnlearningError or ForgottenError.
    """
    runs, name = Storage(config.storage.uri), str(config.name)
    old = runs.within(name)
    if old.exists(FORGOTTEN):
        left = _request(old.read_json(FORGOTTEN))
        if not left.asks(clients, classes):
            refuse_forgotten(old)
        new = runs.within(left.successor)
        if not new.exists(FORGETTING):
            return Certificate.from_json(new.read(CERTIFICATE))
    else:
        new = _begin(config, old, runs, clients, classes, successor, asked_by, allow_inexact)
    return _finish(config, old, new, console)


def _request(tree: dict[str, Any]) -> Request:
    return Request(**tree | {"exclude": tuple(tree["exclude"])})


def _begin(
    config: Config,
    old: Storage,
    runs: Storage,
    clients: Sequence[str],
    classes: Sequence[int],
    successor: str | None,
    asked_by: str,
    allow_inexact: bool,
) -> Storage:
    """Check the request and the old run; note both in the new run's folder, which is returned."""
    refuse_forgotten(old)
    before = read_facts(old)
    held: dict[str, list[int]] = {}
    for card in before.cards:
        held.setdefault(card.client, []).append(card.label)
    request = make_request(str(config.name), held, config.partition.exclude, clients, classes, successor, asked_by)
    new = runs.within(request.successor)
    if new.exists(FORGETTING):
        if not _request(new.read_json(FORGETTING)["request"]).same(request):
            refuse_forgotten(new)
        return new
    if new.names(""):
        raise UnlearningError(f"{new.uri} holds another run", "a name that is free, with --name")
    connect()
    refuse_damaged(config, old, before)
    inexact = _differences(config, old.read_json(pipeline.ENVIRONMENT))
    if inexact and not allow_inexact:
        raise UnlearningError(
            f"run {request.run} was not made here: {'; '.join(inexact)}",
            "the same hardware and versions for a result that is equal bit for bit, or --allow-inexact",
        )
    client, experiment_id = tracking.connect(config)
    traces = find_traces(client, experiment_id, old.uri, request.clients)
    facts = {"request": asdict(request), "before": asdict(before), "inexact": inexact, "mlflow": traces}
    new.write_json(FORGETTING, facts)
    return new


def _differences(config: Config, environments: list[dict[str, str]]) -> list[str]:
    """What of the hardware and versions that made a run is another here."""
    worker = make_plan(config.resources).classifier
    here = ray.get(_environment.options(num_cpus=worker.num_cpus, num_gpus=worker.num_gpus).remote(worker.resources))
    return sorted(
        {
            f"{name} {there.get(name)!r}, here {here.get(name)!r}"
            for there in environments
            for name in there.keys() | here.keys()
            if there.get(name) != here.get(name)
        }
    )


@ray.remote
def _environment(resources: WorkerResources) -> dict[str, str]:
    from fedfactory_ray.devices import assigned_device, environment, prepare_process

    return environment(prepare_process(resources, assigned_device(ray.get_gpu_ids())))


def without(config: Config, request: Request, before: Facts) -> Config:
    """The config of the new run: that of the old, less whom it forgets; no reference, for that saw their images."""
    architecture = "centralised" if not before.experts else "both" if before.classifier else "decentralised"
    changes = {
        "name": request.successor,
        "architecture": architecture,
        "baselines": ["none"],
        "partition": {"exclude": [*config.partition.exclude, *request.exclude]},
    }
    return Config.model_validate(merge(config.model_dump(mode="json"), changes))


def _finish(config: Config, old: Storage, new: Storage, console: Console) -> Certificate:
    """Steps 2 to 6, each of which may have been done before."""
    started = new.read_json(FORGETTING)
    request, before, traces = _request(started["request"]), Facts(**started["before"]), started["mlflow"]
    parent = traces["parents"][0] if traces["parents"] else None
    with open_session(without(config, request, before), console, forgetting=True, parent=parent) as session:
        reuse = plan_reuse(session.config, session.partition, pipeline.make_task(session), before)
        copy_files(old, new, [name for name in reuse.files if not new.exists(name)])
        pipeline.run_phases(session)
        after = read_facts(new)
        with session.phase("deletion"):
            if not old.exists(FORGOTTEN):
                old.write_json(FORGOTTEN, started["request"])
            delete_run(old)
            delete_traces(tracking.connect(config)[0], traces)
        certificate = Certificate(
            request=request,
            inexact=started["inexact"],
            absent=[y for y in range(session.info.classes) if not any(card.label == y for card in after.cards)],
            deleted=what_went(before, after),
            kept={
                "modules": len(reuse.modules),
                "units": len(reuse.units),
                "images": sum(unit.n for unit in reuse.units),
                "classifiers": int(reuse.classifier),
                "experts": len(reuse.experts),
            },
            before=before,
            after=after,
            cost=cost(session.config, reuse, before, after),
            environment=new.read_json(pipeline.ENVIRONMENT),
            mlflow=traces,
        )
        found = residue(new, old, certificate)
        if found:
            raise RuntimeError(f"after the deletion something is left: {'; '.join(found)}")
        text = certificate.to_json()
        new.write(CERTIFICATE, text)
        log_certificate(session, certificate)
        line = {"request": started["request"], "certificate_sha256": hashlib.sha256(text).hexdigest()}
        note(old, line)
        for each in audit_lines(old):
            note(new, each)
        new.delete(FORGETTING)
    return certificate


def recalls(facts: Facts, method: str) -> dict[int, float]:
    """Recall by class of an evaluation."""
    prefix = "recall_class_"
    scores = facts.scores[method]
    return {int(name.removeprefix(prefix)): value for name, value in scores.items() if name.startswith(prefix)}


def held_recall(facts: Facts, method: str, absent: Sequence[int]) -> float:
    """Mean recall of the classes that somebody still holds."""
    return float(np.mean([value for label, value in recalls(facts, method).items() if label not in absent]))


def log_certificate(session: Session, certificate: Certificate) -> None:
    """Tags, metrics before and after, the plot of recall, and the certificate itself, in the new run."""
    run, method = session.run, session.config.main_method
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
