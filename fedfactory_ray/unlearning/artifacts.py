"""Artifacts in MLflow that hold something of the forgotten, found by their content, whatever they are called."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfactory_ray.errors import UnlearningError
from fedfactory_ray.storage.layout import CERTIFICATE
from fedfactory_ray.unlearning.certificate import Certificate, what_went
from fedfactory_ray.unlearning.facts import Facts
from fedfactory_ray.unlearning.request import Request

if TYPE_CHECKING:
    from mlflow import MlflowClient

DIGEST, WORD = re.compile(rb"[0-9a-f]{64}"), re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?")


@dataclass(frozen=True)
class Needles:
    """What tells something of the forgotten: the names of clients who went whole, and digests of all that was deleted,
    in hexadecimal."""

    names: frozenset[str]
    digests: frozenset[str]

    @classmethod
    def of(cls, request: Request, before: Facts, after: Facts) -> Needles:
        """Of a request, and of what the runs before and after it hold."""
        gone = what_went(before, after)
        digests = {
            value for kind in gone.values() for entry in kind for name, value in entry.items() if "sha256" in name
        }
        # That of the partition, which stands beside its counts.
        digests |= {before.partition_sha256} - {after.partition_sha256}
        return cls(frozenset(entry for entry in request.exclude if "/" not in entry), frozenset(digests))

    def found_in(self, content: bytes) -> bool:
        """Whether a file is or holds one: a digest anywhere, a name as a value of JSON or as a word of another text."""
        told = {match.decode() for match in DIGEST.findall(content)} | {hashlib.sha256(content).hexdigest()}
        return bool(self.digests & told) or bool(self.names & _words(content))


def _words(content: bytes) -> set[str]:
    """The values of JSON, or the words of another text; of what is no text none."""
    try:
        text = content.decode()
        return set(_values(json.loads(text)))
    except UnicodeDecodeError:
        return set()
    except (ValueError, RecursionError):
        return set(WORD.findall(text))


def _values(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from _values(each)


@dataclass(frozen=True)
class Artifact:
    """A file `path` of the artifacts at `uri`, of a run or of a model."""

    uri: str
    path: str

    def read(self) -> bytes:
        """Its content."""
        with tempfile.TemporaryDirectory() as folder:
            return Path(repository(self.uri).download_artifacts(self.path, folder)).read_bytes()

    def delete(self) -> None:
        """Delete it."""
        repository(self.uri).delete_artifacts(self.path)


def repository(uri: str) -> Any:
    """Where artifacts lie."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(uri)


def artifacts_of(uri: str) -> list[Artifact]:
    """All files of the artifacts at `uri`, but for a certificate, which tells whom it forgot."""
    store, found, folders = repository(uri), list[Artifact](), [""]
    while folders:
        for file in store.list_artifacts(folders.pop() or None):
            if file.is_dir:
                folders.append(file.path)
            else:
                found.append(Artifact(uri, file.path))
    return [each for each in found if not (each.path == CERTIFICATE and _is_certificate(each.read()))]


def _is_certificate(content: bytes) -> bool:
    try:
        Certificate.from_json(content)
    except UnlearningError:
        return False
    return True


def family(client: MlflowClient, experiment_id: str, parents: Sequence[str]) -> list[str]:
    """Where the artifacts lie of runs, of all runs below them, and of the models of all these; of deleted ones too."""
    from mlflow.entities import ViewType

    found: dict[str, str] = {run_id: client.get_run(run_id).info.artifact_uri for run_id in parents}
    waiting = list(found)
    while waiting:
        below = f"tags.`mlflow.parentRunId` = '{waiting.pop()}'"
        runs = client.search_runs([experiment_id], below, ViewType.ALL, max_results=50_000)
        new = {run.info.run_id: run.info.artifact_uri for run in runs if run.info.run_id not in found}
        found |= new
        waiting += new
    models = [
        model.artifact_location
        for run_id in found
        for model in client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'", max_results=1000)
    ]
    return [*found.values(), *models]


def artifacts_with(
    client: MlflowClient, experiment_id: str, parents: Sequence[str], needles: Needles
) -> list[Artifact]:
    """The artifacts of these runs, and of all below them, that hold a needle."""
    every = [each for uri in family(client, experiment_id, parents) for each in artifacts_of(uri)]
    return [each for each in every if needles.found_in(each.read())]
