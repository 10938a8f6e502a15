"""Deletion of the old run: a note that it had to forget, its settings, certificate and audit log are left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import AUDIT, CERTIFICATE, DOOR, FORGOTTEN, LEASE, SETTINGS
from fedfactory_ray.tracking import runs as tracking
from fedfactory_ray.tracking.curves import expert_run
from fedfactory_ray.unlearning.artifacts import artifacts_of, repository

if TYPE_CHECKING:
    from mlflow import MlflowClient

LEFT = (FORGOTTEN, AUDIT, SETTINGS, CERTIFICATE)
"""Files that stay: the note, the log, the settings, with which the same request is recognised, and the certificate of
a run that was itself made by forgetting."""
HELD = (LEASE, DOOR)
"""Files of whoever works in the folder while it does."""


def delete_run(storage: Storage) -> None:
    """Delete all files of a run but those in LEFT."""
    for name in storage.names(""):
        if name not in (*LEFT, *HELD):
            storage.delete(name)
    storage.prune()


def find_traces(
    client: MlflowClient, experiment_id: str, folders: Sequence[str], clients: Sequence[str]
) -> dict[str, list[str]]:
    """What MLflow holds of `clients` in the runs whose folders are `folders`, also in those that were deleted there.

    Ids by kind: `runs` are the child runs of these clients, with their pictures and modules, and those with figures of
    their experts; `models` all models of these runs; `parents` the runs themselves, those of the first folder first,
    the newest first: they stay, without their artifacts.
    """
    from mlflow.entities import ViewType

    every, names = ViewType.ALL, {name for each in clients for name in (each, expert_run(each))}
    figures = tuple(f"expert/{each}/" for each in clients)
    found: dict[str, list[str]] = {"parents": [], "runs": [], "models": []}
    for folder in folders:
        found["parents"] += tracking.runs_of(client, experiment_id, folder)
    for parent in found["parents"]:
        nested = f"tags.`mlflow.parentRunId` = '{parent}'"
        children = client.search_runs([experiment_id], nested, every, max_results=50_000)
        found["runs"] += [
            run.info.run_id
            for run in children
            if run.info.run_name in names or any(name.startswith(figures) for name in run.data.metrics)
        ]
        models = client.search_logged_models([experiment_id], f"source_run_id = '{parent}'", max_results=1000)
        found["models"] += [model.model_id for model in models]
    return found


def delete_traces(client: MlflowClient, traces: dict[str, list[str]]) -> None:
    """Delete runs and models with all their artifacts, and of the parents the artifacts, less their certificates; what
    is gone already is left alone."""
    for run in _runs(client, traces["runs"]):
        repository(run.info.artifact_uri).delete_artifacts()
        if run.info.lifecycle_stage == "active":
            client.delete_run(run.info.run_id)
    for run in _runs(client, traces["parents"]):
        for artifact in artifacts_of(run.info.artifact_uri):
            artifact.delete()
    for model in _models(client, traces):
        repository(model.artifact_location).delete_artifacts()
        client.delete_logged_model(model.model_id)


def traces_left(client: MlflowClient, traces: dict[str, list[str]]) -> list[str]:
    """Runs of these traces that are still shown or still have artifacts, and models that are still there."""
    runs = _runs(client, traces["runs"])
    left = [r for r in runs if r.info.lifecycle_stage == "active" or repository(r.info.artifact_uri).list_artifacts()]
    return [r.info.run_id for r in left] + [model.model_id for model in _models(client, traces)]


def _runs(client: MlflowClient, ids: Sequence[str]) -> list[Any]:
    """The runs of these ids, less those that were removed for good (`mlflow gc`)."""
    from mlflow.exceptions import MlflowException

    found = []
    for run_id in ids:
        try:
            found.append(client.get_run(run_id))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    return found


def _models(client: MlflowClient, traces: dict[str, list[str]]) -> list[Any]:
    found: list[Any] = []
    for parent in _runs(client, traces["parents"]):
        of_parent = f"source_run_id = '{parent.info.run_id}'"
        found += client.search_logged_models([parent.info.experiment_id], of_parent, max_results=1000)
    return [model for model in found if model.model_id in traces["models"]]
