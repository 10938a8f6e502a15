"""Verification: a certificate against what storage and MLflow hold, and against a run made from nothing."""

from __future__ import annotations

import hashlib
import tempfile
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rich.console import Console

from fedfactory_ray.data.partition_files import read_partition
from fedfactory_ray.errors import FedFactoryError, UnlearningError
from fedfactory_ray.pipeline import phases
from fedfactory_ray.pipeline.session import refuse_forgotten
from fedfactory_ray.settings.config import Config, merge
from fedfactory_ray.storage import layout
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.synthesis.plan import make_units
from fedfactory_ray.synthesis.shard import Shard, read_shard
from fedfactory_ray.tracking import runs as tracking
from fedfactory_ray.unlearning.artifacts import Needles, artifacts_with
from fedfactory_ray.unlearning.certificate import Certificate, audit_lines, what_stayed, what_went
from fedfactory_ray.unlearning.deletion import find_traces, traces_left
from fedfactory_ray.unlearning.facts import AT_ONCE, Facts, differing_weights, read_facts
from fedfactory_ray.unlearning.request import Request
from fedfactory_ray.unlearning.residue import deleted_content, left_in_new, left_in_old, misplaced, untold


@dataclass(frozen=True)
class Check:
    """One check: what was checked, and what is wrong with it (empty: nothing)."""

    name: str
    wrong: list[str]


def wrong_rows(new: Storage, certificate: Certificate, config: Config) -> list[str]:
    """Units that are not what the certificate says, or that hold a row of the forgotten."""
    request, deleted = certificate.request, {entry["sha256"] for entry in certificate.deleted["modules"]}
    synthesis, after = config.synthesis, certificate.after
    units = make_units(after.cards, synthesis.images_per_class, synthesis.unit_size, config.seed)
    planned = {unit.file: (unit.n, unit.module_sha256) for unit in units}

    def wrong(line: Shard) -> bool:
        found = read_shard(new, line.file)
        if found is None or found.rows_sha256 != line.rows_sha256:
            return True
        forgotten = request.forgets(found.client, found.label) or found.module_sha256 in deleted
        return forgotten or planned.get(found.file) != (found.n, found.module_sha256)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = [line.file for line, bad in zip(after.shards, pool.map(wrong, after.shards), strict=True) if bad]
    return found + sorted(planned.keys() - {line.file for line in after.shards})


def differences(ours: Facts, theirs: Facts) -> list[str]:
    """Names of what differs between two runs."""
    a, b = ours.digests(), theirs.digests()
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def wrong_partition(new: Storage, after: Facts) -> list[str]:
    """The partition's files, where they are not what the certificate says, or not of one another."""
    same = read_partition(new).sha256 == after.partition_sha256
    return [] if same else [f"{layout.INDICES} and {layout.PARTITION}"]


def contradictions(certificate: Certificate) -> list[str]:
    """What of a certificate does not follow from the rest of it."""
    request, before, after = certificate.request, certificate.before, certificate.after
    told = {kind: lines for kind, lines in certificate.deleted.items() if kind != "files"}
    wrong = ["what was deleted"] * (told != what_went(before, after))
    wrong += ["what was kept"] * (certificate.kept != what_stayed(before, after))
    named = [card.key for card in after.cards] + [note.key for note in after.divergences]
    left = [f"a module of {client}, class {label}" for client, label in named if request.forgets(client, label)]
    return wrong + left


def verify(
    uri: str, config: Config, console: Console, *, retrain: bool = False
) -> tuple[Certificate | None, list[Check]]:
    """Check the certificate at `uri`, the file in its run's folder. `config` is that run's, as it is stored.

    `retrain` makes the run without the client from nothing, in a folder of its own that is deleted again, and compares
    every digest. A certificate that cannot be read fails the one check there is. Raises UnlearningError where there is
    no certificate, or where the run is not finished.
    """
    new = Storage(uri).parent
    refuse_forgotten(new, forgetting=True)
    if not new.exists(layout.CERTIFICATE) or new.exists(layout.FORGETTING):
        raise UnlearningError(f"{new.uri} holds no certificate of a finished request", "jobs/unlearn.py to its end")
    text = new.read(layout.CERTIFICATE)
    try:
        certificate = Certificate.from_json(text)
    except UnlearningError as error:
        return None, [Check("the certificate can be read", [_line(error)])]
    request, after = certificate.request, certificate.after
    old, digest = new.parent.within(request.run), hashlib.sha256(text).hexdigest()
    client, experiment_id = tracking.tracking_client(config)

    def note() -> list[str]:
        there = Request.of(old.read_json(layout.FORGOTTEN)) if old.exists(layout.FORGOTTEN) else None
        return [] if there == request and new.name == request.successor else [f"{old.uri}/{layout.FORGOTTEN}"]

    def logs() -> list[str]:
        noted = [[line["certificate_sha256"] for line in audit_lines(run)] for run in (old, new)]
        return [] if all(digest in each for each in noted) else [layout.AUDIT]

    def copies() -> list[str]:
        runs = tracking.runs_of(client, experiment_id, new.uri)
        found = {run: tracking.read_artifact(client, run, layout.CERTIFICATE) for run in runs}
        # A start that was killed before it was noted in the logs left one of its own.
        logged = {run: copy for run, copy in found.items() if copy is not None}
        return [] if not logged or text in logged.values() else [f"run {run}" for run in logged]

    def same() -> list[str]:
        there = read_facts(new)
        scores = [f"scores, {name}" for name in after.scores if there.scores.get(name) != after.scores[name]]
        return differences(there, after) + scores

    def files() -> list[str]:
        found = left_in_old(old) + left_in_new(new, after) + misplaced(old, old=True) + misplaced(new)
        found += untold(new, [entry for entry in request.exclude if "/" not in entry])
        found += [each for run in (old, new) for each in deleted_content(run, certificate.deleted)]
        return list(dict.fromkeys(found))

    def traces() -> list[str]:
        folders = [new.parent.within(line["request"]["run"]).uri for line in audit_lines(old)]
        found = find_traces(client, experiment_id, folders, request.clients)
        known = {kind: sorted({*ids, *found[kind]}) for kind, ids in certificate.mlflow.items()}
        left = traces_left(client, known | {"models": certificate.mlflow["models"]})
        needles = Needles.of(request, certificate.before, after)
        runs = [*found["parents"], *tracking.runs_of(client, experiment_id, new.uri)]
        return left + [f"{each.uri}/{each.path}" for each in artifacts_with(client, experiment_id, runs, needles)]

    checks = [
        _check("the certificate agrees with itself", lambda: contradictions(certificate)),
        _check("the old run's note is this request", note),
        _check("the audit logs name this certificate", logs),
        _check("MLflow's copy of the certificate is this one", copies),
        _check("the run is what the certificate says", same),
        _check("the partition is what the certificate says", lambda: wrong_partition(new, after)),
        _check("weights are whole", lambda: differing_weights(new, after)),
        _check("no unit holds a row of the forgotten", lambda: wrong_rows(new, certificate, config)),
        _check("no file is left of the forgotten", files),
        _check("MLflow holds no artifact of the forgotten", traces),
    ]
    if retrain:
        again = _retrained(config, certificate, new, console)
        checks.append(Check("a run from nothing is equal", differences(after, again)))
    return certificate, checks


def _check(name: str, find: Callable[[], list[str]]) -> Check:
    """A check, which fails where what it looks at is missing or damaged."""
    try:
        return Check(name, find())
    except (FedFactoryError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        return Check(name, [_line(error)])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _retrained(config: Config, certificate: Certificate, new: Storage, console: Console) -> Facts:
    """Facts of the same run, made from nothing, beside it, for every node can write there; it is deleted again."""
    scratch = new.parent.within(layout.retrained_folder(uuid.uuid4().hex))
    try:
        with tempfile.TemporaryDirectory() as folder:
            places = {"storage": {"uri": scratch.uri}, "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"}}
            changes = places | {"architecture": certificate.after.architecture}
            phases.run(Config.model_validate(merge(config.model_dump(mode="json"), changes)), console)
        return read_facts(scratch.within(str(config.name)))
    finally:
        new.parent.delete_folder(scratch.name)
