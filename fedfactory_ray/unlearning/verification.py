"""Verification: a certificate against what storage and MLflow hold, and against a run made from nothing."""

from __future__ import annotations

import hashlib
import posixpath
import re
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from fedfactory_ray.errors import UnlearningError
from fedfactory_ray.pipeline import phases
from fedfactory_ray.pipeline.session import refuse_forgotten
from fedfactory_ray.settings.config import Config, merge
from fedfactory_ray.storage import layout
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.synthesis.plan import make_units
from fedfactory_ray.synthesis.shard import Shard, read_shard
from fedfactory_ray.tracking import runs as tracking
from fedfactory_ray.unlearning.certificate import Certificate, audit_lines
from fedfactory_ray.unlearning.deletion import LEFT, find_traces, traces_left
from fedfactory_ray.unlearning.facts import AT_ONCE, Facts, differing_weights, read_facts, weights


@dataclass(frozen=True)
class Check:
    """One check: what was checked, and what is wrong with it (empty: nothing)."""

    name: str
    wrong: list[str]


def digests_of(storage: Storage) -> dict[str, str]:
    """SHA-256 of every file of a folder, by name."""
    names = storage.names("")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(names, pool.map(storage.sha256, names), strict=True))


def left_in_old(old: Storage) -> list[str]:
    """Files of a deleted run that should be gone."""
    return [f"{old.uri}/{name}" for name in old.names("") if name not in (*LEFT, *HELD)]


def left_in_new(new: Storage, after: Facts) -> list[str]:
    """Files of the new run that it does not account for, and that jobs/compare.py may not have added since. An unknown
    one (a checkpoint, say) counts as left."""
    accounted = weights(after)
    cards = {f"{posixpath.dirname(name)}/{layout.CARD}" for name in accounted}
    units = {shard.file for shard in after.shards}
    clients = {card.client for card in after.cards}
    lone = layout.lone_classifier("")
    ours = lone if after.classifier is None else f"{lone}|{layout.METHOD}/"
    compared = [rf"{layout.CLASSIFIERS}/(?!{ours})[^/]+"]
    compared += [re.escape(layout.classifier_folder(layout.lone_classifier(client))) for client in clients]
    compared += [re.escape(layout.expert_folder(client)) for client in clients if client not in after.experts]
    finished = re.compile(f"({'|'.join(compared)})/({re.escape(layout.WEIGHTS)}|{re.escape(layout.CARD)})")
    known = layout.FILES | {*HELD} | cards | units | accounted.keys()
    return [f"{new.uri}/{name}" for name in new.names("") if name not in known and not finished.fullmatch(name)]


def forgotten_content(storage: Storage, certificate: Certificate) -> list[str]:
    """Files of a folder that hold something forgotten, whatever their names: weights, rows or the old partition."""
    deleted, before, after = certificate.deleted, certificate.before, certificate.after
    digests = {entry["sha256"] for kind in ("modules", "weights") for entry in deleted[kind]}
    gone_rows = {shard.rows_sha256 for shard in before.shards} - {shard.rows_sha256 for shard in after.shards}
    modules = {card.sha256 for card in before.cards} - {card.sha256 for card in after.cards}

    def holds(item: tuple[str, str]) -> bool:
        name, digest = item
        if digest in digests | modules:
            return True
        start = storage.start(name, 4)
        if start != b"PAR1":
            return False
        rows = shard_at(storage, name)
        if rows is not None:
            forgotten = certificate.request.forgets(rows.client, rows.label)
            return forgotten or rows.rows_sha256 in gone_rows or rows.module_sha256 in modules
        there = partition_at(storage, name)
        return there is None or there.sha256 != after.partition_sha256

    found = digests_of(storage).items()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        held = [name for (name, _), bad in zip(found, pool.map(holds, found), strict=True) if bad]
    return [f"{storage.uri}/{name}" for name in held]


def misplaced(storage: Storage, kinds: Mapping[str, Callable[[bytes], object]]) -> list[str]:
    """Files in a folder itself that are not of the kind that their names tell."""
    wrong = []
    for name, read in kinds.items():
        if storage.exists(name):
            try:
                read(storage.read(name) if storage.size(name) <= LARGEST else b"")
            except (ValueError, RecursionError, TypeError, KeyError, FedFactoryError):
                wrong.append(f"{storage.uri}/{name}")
    return wrong


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


def verify(uri: str, config: Config, console: Console, *, retrain: bool = False) -> tuple[Certificate, list[Check]]:
    """Check the certificate at `uri`, the file in its run's folder. `config` is that run's, as it is stored.

    `retrain` makes the run without the client from nothing, in a folder of its own that is deleted again, and compares
    every digest. Raises UnlearningError where there is no certificate, or where the run is not finished.
    """
    new = Storage(uri).parent
    refuse_forgotten(new, forgetting=True)
    if not new.exists(layout.CERTIFICATE) or new.exists(layout.FORGETTING):
        raise UnlearningError(f"{new.uri} holds no certificate of a finished request", "jobs/unlearn.py to its end")
    text = new.read(layout.CERTIFICATE)
    certificate = Certificate.from_json(text)
    old = new.parent.within(certificate.request.run)
    digest = hashlib.sha256(text).hexdigest()
    noted = [[line["certificate_sha256"] for line in audit_lines(run)] for run in (old, new)]
    client, experiment_id = tracking.tracking_client(config)
    folders = [new.parent.within(line["request"]["run"]).uri for line in audit_lines(old)]
    found = find_traces(client, experiment_id, folders, certificate.request.clients)
    traces = {kind: sorted({*ids, *found[kind]}) for kind, ids in certificate.mlflow.items()}
    traces["models"] = certificate.mlflow["models"]
    checks = [
        Check("the audit logs name this certificate", [] if all(digest in each for each in noted) else [layout.AUDIT]),
        Check("the run is what the certificate says", differences(read_facts(new), certificate.after)),
        Check("weights are whole", differing_weights(new, certificate.after)),
        Check("no unit holds a row of the forgotten", wrong_rows(new, certificate, config)),
        Check(
            "no file is left of the forgotten",
            left_in_old(old) + left_in_new(new, certificate.after, certificate.deleted),
        ),
        Check("MLflow holds no artifact of the forgotten", traces_left(client, traces)),
    ]
    if retrain:
        again = _retrained(config, certificate, new, console)
        checks.append(Check("a run from nothing is equal", differences(certificate.after, again)))
    return certificate, checks


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
