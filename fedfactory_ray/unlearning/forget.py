"""Forgetting: a new run without the client, of what the old one had and need not make again; then the old one goes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from fedfactory_ray.cluster.plan import connect
from fedfactory_ray.errors import FedFactoryError, UnlearningError
from fedfactory_ray.pipeline import phases
from fedfactory_ray.pipeline.listeners import Listeners
from fedfactory_ray.pipeline.session import claim, open_session, refuse_forgotten
from fedfactory_ray.settings.config import Config, merge
from fedfactory_ray.storage.files import TEMPORARY, Storage
from fedfactory_ray.storage.layout import CERTIFICATE, CONFIG, ENVIRONMENT, FORGETTING, FORGOTTEN, PENDING
from fedfactory_ray.storage.lease import hold
from fedfactory_ray.tracking import runs as tracking
from fedfactory_ray.unlearning.artifacts import Needles, artifacts_with
from fedfactory_ray.unlearning.certificate import (
    Certificate,
    audit_lines,
    cost,
    note,
    read_certificate,
    what_stayed,
    what_went,
)
from fedfactory_ray.unlearning.deletion import HELD, delete_run, delete_traces, find_traces
from fedfactory_ray.unlearning.doubts import ask_canaries, doubts_of_new, find_doubts, refuse_doubts
from fedfactory_ray.unlearning.facts import Facts, classes_held, read_facts, refuse_damaged
from fedfactory_ray.unlearning.report import log_certificate
from fedfactory_ray.unlearning.request import Request, make_request
from fedfactory_ray.unlearning.residue import deleted_content, files_to_go, left_in_new, left_in_old, refuse_residue
from fedfactory_ray.unlearning.reuse import clients_left, copy_files, modules_left, plan_reuse


def forget(
    config: Config,
    clients: Sequence[str],
    classes: Sequence[int],
    console: Console,
    *,
    asked_by: str,
    successor: str | None = None,
    allow_inexact: bool = False,
) -> Certificate:
    """Make of the finished run of `config` one without `clients` (or without `classes` of theirs), and delete the old.

    Steps: (1) note the request in the old run, which one request alone can, check that run, and note both in the new
    one's folder; (2) copy what did not depend on the clients; (3) run all phases, which make what is missing, and check
    the result; (4) leave a note in the old run, which is refused from then on; (5) delete it, and what MLflow has of
    it; (6) certificate and audit lines. The same call goes on after step 1 from wherever it was stopped; after step 6
    it deletes what earlier versions or others left in MLflow, and returns the certificate. Raises UnlearningError,
    ForgottenError, RunConflictError for settings that are not the old run's, or FolderHeldError where somebody works on
    either run.
    """
    old = Storage(config.storage.uri).within(str(config.name))
    fulfilled = _fulfilled(old, clients, classes)
    if fulfilled is not None:
        request = fulfilled.request
        _clean_tracking(config, _traces(config, old, request), request, fulfilled.before, fulfilled.after)
        return fulfilled
    with hold(old, take_over=config.take_over):
        fulfilled = _fulfilled(old, clients, classes)  # it may have been, while this waited
        if fulfilled is not None:
            return fulfilled
        if old.exists(FORGOTTEN):
            new = old.parent.within(Request.of(old.read_json(FORGOTTEN)).successor)
        else:
            request = _asked(config, old, clients, classes, successor, asked_by)
            new = _begin(config, old, request, allow_inexact=allow_inexact)
        return _finish(config, old, new, console, allow_inexact=allow_inexact)


def _fulfilled(old: Storage, clients: Sequence[str], classes: Sequence[int]) -> Certificate | None:
    """The certificate of the request, where it is fulfilled. Raises ForgottenError where another one was."""
    if not old.exists(FORGOTTEN):
        return None
    left = Request.of(old.read_json(FORGOTTEN))
    if not left.asks(clients, classes):
        refuse_forgotten(old)
    new = old.parent.within(left.successor)
    return None if new.exists(FORGETTING) else read_certificate(new)


def withdraw(config: Config) -> Request:
    """Take back the request to make the run of `config` forget, with all that was made for it; returns it.

    The same call goes on where it was stopped. Raises UnlearningError where there is no request, or where the old run
    was given up already: then it can only be finished.
    """
    runs, old = Storage(config.storage.uri), Storage(config.storage.uri).within(str(config.name))
    with hold(old, take_over=config.take_over):
        if old.exists(FORGOTTEN):
            left = Request.of(old.read_json(FORGOTTEN))
            raise UnlearningError(
                f"the request to forget {', '.join(left.exclude)} from run {left.run} can no longer be withdrawn",
                "the command that began it: the old run has been given up",
            )
        if not old.exists(PENDING):
            raise UnlearningError(f"no request is pending for run {config.name}", "a run with a request")
        request = Request.of(old.read_json(PENDING))
        new = runs.within(request.successor)
        if new.exists(FORGETTING) and Request.of(new.read_json(FORGETTING)["request"]).same(request):
            with hold(new, take_over=config.take_over):
                # The note goes last: without it, what is left would pass for a run.
                for file in sorted(set(new.names("")) - {*HELD}, key=lambda name: name == FORGETTING):
                    new.delete(file)
                new.prune()
        old.delete(PENDING)
    return request


def _asked(
    config: Config,
    old: Storage,
    clients: Sequence[str],
    classes: Sequence[int],
    successor: str | None,
    asked_by: str,
) -> Request:
    """The request to the old run, as noted there. Raises UnlearningError where another is pending."""
    refuse_forgotten(old)
    before = read_facts(old)
    theirs = old.read_json(CONFIG)
    claim(config.determining() | {k: v for k, v in theirs.items() if k == "modules"}, old)
    held, gone = classes_held(old), config.partition.exclude
    request = make_request(str(config.name), held, gone, clients, classes, successor, asked_by)
    if not modules_left(request, before):
        raise UnlearningError(f"run {request.run} would have no module left", "a run of at least one other module")
    return request


def refuse_other(old: Storage, request: Request, note: str) -> None:
    """Raise UnlearningError where a note in the old run, PENDING or FORGOTTEN, is of another request, or gone."""
    asked = Request.of(old.read_json(note)) if old.exists(note) else None
    if asked is None:
        raise UnlearningError(
            f"the request to forget {', '.join(request.exclude)} from run {request.run} was withdrawn",
            "the request anew",
        )
    if not asked.same(request):
        raise UnlearningError(
            f"run {request.run} is being made into {asked.successor}, to forget {', '.join(asked.exclude)}",
            "that request finished first, by the command that began it; then ask its successor; or that request taken "
            f"back: jobs/unlearn.py withdraw --run {request.run}",
        )


def _begin(config: Config, old: Storage, request: Request, *, allow_inexact: bool) -> Storage:
    """Note the request in the old run, check that run, and note both in the new run's folder, which is returned. A
    request that is refused leaves no note."""
    noted = old.create(PENDING, json.dumps(asdict(request), indent=2, sort_keys=True).encode())
    refuse_other(old, request, PENDING)
    try:
        return _checked(config, old, request, allow_inexact=allow_inexact)
    except FedFactoryError:
        if noted:
            old.delete(PENDING)
        raise


def _checked(config: Config, old: Storage, request: Request, *, allow_inexact: bool) -> Storage:
    """Check that the old run can be made into what the request asks for; note both in the new run's folder."""
    new, before = old.parent.within(request.successor), read_facts(old)
    if new.exists(FORGETTING):
        if not Request.of(new.read_json(FORGETTING)["request"]).same(request):
            refuse_forgotten(new)
        return new
    refuse_taken(new)
    connect()
    refuse_damaged(config, old, before)
    here = ask_canaries(config, clients_left(request, before))
    doubts = find_doubts(config, request, before, old.read_json(ENVIRONMENT), here)
    refuse_doubts(config, doubts, allowed=allow_inexact)
    _traces(config, old, request)
    original = old.read_json(CERTIFICATE)["cost"]["original_run"] if old.exists(CERTIFICATE) else None
    precisions = {card.precision for card in before.cards} if doubts else set()
    facts = {"request": asdict(request), "before": asdict(before), "original": original}
    # On other hardware `auto` may come to another arithmetic than that of the modules that are kept.
    facts |= {"precision": precisions.pop() if len(precisions) == 1 else None}
    facts |= {"environment": old.read_json(ENVIRONMENT)}
    with hold(new):
        refuse_taken(new)
        new.write_json(FORGETTING, facts)
    return new


def refuse_taken(new: Storage) -> None:
    """Raise UnlearningError where a folder holds a run."""
    if any(not name.endswith(TEMPORARY) and name not in HELD for name in new.names("")):
        raise UnlearningError(f"{new.uri} holds another run", "a name that is free, with --name")


def _traces(config: Config, old: Storage, request: Request) -> dict[str, list[str]]:
    """What MLflow holds of the forgotten in the old run, and in those that it was itself made from. Raises
    UnlearningError where it does not know the old run: then it is the wrong store."""
    runs = dict.fromkeys([request.run, *(line["request"]["run"] for line in audit_lines(old))])
    client, experiment_id = tracking.tracking_client(config)
    found = find_traces(client, experiment_id, [old.parent.within(run).uri for run in runs], request.clients)
    if not found["parents"]:
        raise UnlearningError(
            f"MLflow at {tracking.tracking_uri(config)} knows nothing of {old.uri}",
            "the store in which the run was logged (--tracking.uri), so that what it holds of the clients goes too; or "
            "the command that made the run once more, which logs it there",
        )
    return found


def _clean_tracking(
    config: Config, traces: dict[str, list[str]], request: Request, before: Facts, after: Facts
) -> None:
    """Delete from MLflow what is known of the forgotten, and what else tells something of them by its content."""
    client, experiment_id = tracking.tracking_client(config)
    delete_traces(client, traces)
    for artifact in artifacts_with(client, experiment_id, traces["parents"], Needles.of(request, before, after)):
        artifact.delete()


def without(config: Config, request: Request, before: Facts, precision: str | None) -> Config:
    """The config of the new run: that of the old, less whom it forgets; no reference, for that saw their images. It
    computes in the `precision` of the modules that are kept, where that is given."""
    changes: dict[str, Any] = {
        "name": request.successor,
        "architecture": before.architecture,
        "baselines": ["none"],
        "partition": {"exclude": [*config.partition.exclude, *request.exclude]},
    }
    if precision is not None:
        changes["generator"] = {"precision": precision}
    changed = Config.model_validate(merge(config.model_dump(mode="json"), changes))
    return changed.model_copy(update={"take_over": config.take_over})


def _finish(config: Config, old: Storage, new: Storage, console: Console, *, allow_inexact: bool) -> Certificate:
    """Steps 2 to 6, each of which may have been done before."""
    started = new.read_json(FORGETTING)
    request, before = Request.of(started["request"]), Facts(**started["before"])
    given_up = old.exists(FORGOTTEN)
    refuse_other(old, request, FORGOTTEN if given_up else PENDING)
    traces = _traces(config, old, request)
    connect()
    wanted, parent = without(config, request, before, started.get("precision")), traces["parents"][0]
    here = ask_canaries(wanted, clients_left(request, before))
    inexact = find_doubts(config, request, before, started["environment"], here)
    refuse_doubts(config, inexact, allowed=allow_inexact)
    with open_session(wanted, console, forgetting=True, parent=parent) as session:
        if not new.exists(ENVIRONMENT):  # what is kept was made there
            new.write_json(ENVIRONMENT, started["environment"])
        reuse = plan_reuse(session.config, session.partition, session.info.task, before)
        with session.phase("reuse"):
            copy_files(old, new, [name for name in reuse.files if not new.exists(name)])
        report = phases.run_phases(session, Listeners(console, session.logged))
        if report.missing:
            raise UnlearningError(
                f"no expert of {', '.join(report.missing)} could be fitted: {next(iter(report.missing.values()))}",
                "every expert of the run; the same command tries again",
            )
        after = read_facts(new)
        refuse_residue(left_in_new(new, after))
        refuse_residue(deleted_content(new, what_went(before, after)))
        inexact += doubts_of_new(config, before, after, here)
        refuse_doubts(config, inexact, allowed=allow_inexact)
        with session.phase("deletion"):
            if not given_up:
                started["files"] = files_to_go(old, new)
                new.write_json(FORGETTING, started)  # of what is half deleted it can no longer be told
                refuse_other(old, request, PENDING)
                old.create(FORGOTTEN, json.dumps(started["request"], indent=2, sort_keys=True).encode())
            refuse_other(old, request, FORGOTTEN)
            delete_run(old)
            _clean_tracking(config, traces, request, before, after)
        refuse_residue(left_in_old(old))
        certificate = Certificate(
            request=request,
            inexact=inexact,
            absent=[y for y in range(session.info.classes) if not any(card.label == y for card in after.cards)],
            deleted=what_went(before, after) | {"files": started.get("files", [])},
            kept=what_stayed(before, after),
            before=before,
            after=after,
            cost=cost(session.config, before, after, session.worked, started["original"]),
            environment=new.read_json(ENVIRONMENT),
            mlflow=traces,
        )
        text = certificate.to_json()
        new.write(CERTIFICATE, text)
        log_certificate(session, certificate)
        line = {"request": started["request"], "certificate_sha256": hashlib.sha256(text).hexdigest()}
        note(old, line)
        for each in audit_lines(old):
            note(new, each)
        new.delete(FORGETTING)
    return certificate
