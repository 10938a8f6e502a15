"""Verification: a certificate against what storage and MLflow hold, and against a run made from nothing."""

from __future__ import annotations

import hashlib
import posixpath
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow.parquet as pq
from rich.console import Console

from fedfactory_ray import pipeline, tracking
from fedfactory_ray.config import METHOD, Config, merge
from fedfactory_ray.errors import UnlearningError
from fedfactory_ray.session import FORGETTING, SECONDS, SETTINGS
from fedfactory_ray.storage import Storage
from fedfactory_ray.synthesis.plan import Unit, make_units
from fedfactory_ray.synthesis.shard import verified_digest
from fedfactory_ray.synthesis.synthesize import MANIFEST
from fedfactory_ray.unlearning.certificate import CERTIFICATE, Certificate, audit_lines
from fedfactory_ray.unlearning.deletion import AUDIT, LEFT, traces_left
from fedfactory_ray.unlearning.facts import AT_ONCE, Facts, differing_weights, read_facts, weights
from fedfactory_ray.unlearning.request import Request

KNOWN = {
    *("config.json", "partition.json", "partition.parquet", "comparison.json"),
    *(MANIFEST, SECONDS, SETTINGS, FORGETTING, CERTIFICATE, AUDIT, pipeline.EVALUATION, pipeline.ENVIRONMENT),
}
"""Files of a run beside weights, cards and units."""


@dataclass(frozen=True)
class Check:
    """One check: what was checked, and what is wrong with it (empty: nothing)."""

    name: str
    wrong: list[str]


def residue(new: Storage, old: Storage, certificate: Certificate) -> list[str]:
    """What of the forgotten is left in the folders of both runs, by the names of files and the content of weights.

    Every file must be one that the new run accounts for: what is not known (a checkpoint, say) counts as left.
    """
    found = [f"{old.uri}/{name}" for name in old.names("") if name not in LEFT]
    accounted = {name: digest for name, digest in weights(certificate.after).items()}
    cards = {f"{posixpath.dirname(name)}/card.json" for name in accounted}
    units = {shard.file for shard in certificate.after.shards}
    for name in new.names(""):
        if name in KNOWN | cards | units or name in accounted or _baseline(name):
            continue
        found.append(f"{new.uri}/{name}")
    gone = {entry["sha256"] for kind in ("modules", "weights") for entry in certificate.deleted[kind]}
    return found + [f"{new.uri}/{name}" for name, digest in accounted.items() if digest in gone]


def _baseline(name: str) -> bool:
    """Whether a file is a finished baseline's, which jobs/compare.py may have made of the new run since."""
    folder, file = posixpath.split(name)
    return posixpath.dirname(folder) == "classifier" and folder != f"classifier/{METHOD}" and "." in file


def wrong_rows(new: Storage, certificate: Certificate, config: Config) -> list[str]:
    """Units that are not what the certificate says, or that hold a row of the forgotten."""
    request, deleted = certificate.request, {entry["sha256"] for entry in certificate.deleted["modules"]}
    synthesis = config.synthesis
    cards = certificate.after.cards
    units = {u.file: u for u in make_units(cards, synthesis.images_per_class, synthesis.unit_size, config.seed)}

    def wrong(line: tuple[str, str]) -> bool:
        file, digest = line
        if file not in units or verified_digest(new, units[file]) != digest:
            return True
        return _holds(new, units[file], request, deleted)

    lines = [(shard.file, shard.rows_sha256) for shard in certificate.after.shards]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = [file for (file, _), bad in zip(lines, pool.map(wrong, lines), strict=True) if bad]
    return found + sorted(units.keys() - {file for file, _ in lines})


def _holds(storage: Storage, unit: Unit, request: Request, modules: set[str]) -> bool:
    table = pq.read_table(storage.path(unit.file), filesystem=storage.filesystem, columns=["client", "label", "module"])
    rows = {(row["client"], row["label"], row["module"]) for row in table.to_pylist()}
    return any(request.forgets(client, label) or module in modules for client, label, module in rows)


def differences(ours: Facts, theirs: Facts) -> list[str]:
    """Names of what differs between two runs."""
    a, b = ours.digests(), theirs.digests()
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def verify(uri: str, config: Config, retrain: bool, console: Console) -> tuple[Certificate, list[Check]]:
    """Check the certificate at `uri`, the file in its run's folder. `config` is that run's, as it is stored.

    `retrain` makes the run without the client from nothing, in a folder of its own that is deleted again, and compares
    every digest. Raises UnlearningError where there is no certificate, or where the run is not finished.
    """
    new = Storage(posixpath.dirname(uri))
    if not new.exists(CERTIFICATE) or new.exists(FORGETTING):
        raise UnlearningError(f"{new.uri} holds no certificate of a finished request", "jobs/unlearn.py to its end")
    text = new.read(CERTIFICATE)
    certificate = Certificate.from_json(text)
    old = Storage(posixpath.dirname(new.uri)).within(certificate.request.run)
    digest = hashlib.sha256(text).hexdigest()
    noted = [[line["certificate_sha256"] for line in audit_lines(run)] for run in (old, new)]
    client, _ = tracking.connect(config)
    checks = [
        Check("the audit logs name this certificate", [] if all(digest in each for each in noted) else [AUDIT]),
        Check("the run is what the certificate says", differences(read_facts(new), certificate.after)),
        Check("weights are whole", differing_weights(new, certificate.after)),
        Check("no unit holds a row of the forgotten", wrong_rows(new, certificate, config)),
        Check("no file is left of the forgotten", residue(new, old, certificate)),
        Check("MLflow holds no artifact of the forgotten", traces_left(client, certificate.mlflow)),
    ]
    if retrain:
        checks.append(Check("a run from nothing is equal", differences(certificate.after, _retrained(config, console))))
    return certificate, checks


def _retrained(config: Config, console: Console) -> Facts:
    """Facts of the same run, made from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        places = {"storage": {"uri": folder}, "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"}}
        again = Config.model_validate(merge(config.model_dump(mode="json"), places))
        pipeline.run(again, console)
        return read_facts(Storage(folder).within(str(config.name)))
