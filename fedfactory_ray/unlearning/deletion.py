"""Deletion: of the old run a note is left that it had to forget, with its settings and the audit log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedfactory_ray import tracking
from fedfactory_ray.config import SETTINGS
from fedfactory_ray.session import FORGOTTEN
from fedfactory_ray.storage import Storage

if TYPE_CHECKING:
    from mlflow import MlflowClient

AUDIT = "audit.jsonl"
LEFT = (FORGOTTEN, AUDIT, SETTINGS)
"""Files that stay: the note, the log, and the settings, with which the same request is recognised."""


def delete_run(storage: Storage) -> None:
    """Delete all files of a run but those in LEFT."""
    for name in storage.names(""):
        if name not in LEFT:
            storage.delete(name)
    storage.prune()


def find_traces(client: MlflowClient, experiment_id: str, folder: str, clients: list[str]) -> dict[str, list[str]]:
    """What MLflow holds of clients: the child runs of theirs, with their pictures and modules, and all models that the
    run's starts logged. By kind: `parents` (newest first, not to be deleted), `runs` and `models` (ids)."""
    parents = client.search_runs([experiment_id], f"tags.`{tracking.FOLDER}` = '{folder}'")
    names = {name for each in clients for name in (each, f"expert-{each}")}
    found: dict[str, list[str]] = {"parents": [run.info.run_id for run in parents], "runs": [], "models": []}
    for parent in found["parents"]:
        children = client.search_runs([experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'", max_results=50_000)
        found["runs"] += [run.info.run_id for run in children if run.info.run_name in names]
        models = client.search_logged_models([experiment_id], f"source_run_id = '{parent}'", max_results=1000)
        found["models"] += [model.model_id for model in models]
    return found


def delete_traces(client: MlflowClient, traces: dict[str, list[str]]) -> None:
    """Delete runs and models with all their artifacts; what is gone already is left alone."""
    for run_id in traces["runs"]:
        run = client.get_run(run_id)
        _artifacts(run.info.artifact_uri).delete_artifacts()
        if run.info.lifecycle_stage == "active":
            client.delete_run(run_id)
    for model in _models(client, traces):
        _artifacts(model.artifact_location).delete_artifacts()
        client.delete_logged_model(model.model_id)


def traces_left(client: MlflowClient, traces: dict[str, list[str]]) -> list[str]:
    """Runs of these traces that are still shown or still have artifacts, and models that are still there."""
    runs = [client.get_run(run_id) for run_id in traces["runs"]]
    left = [r for r in runs if r.info.lifecycle_stage == "active" or _artifacts(r.info.artifact_uri).list_artifacts()]
    return [r.info.run_id for r in left] + [model.model_id for model in _models(client, traces)]


def _models(client: MlflowClient, traces: dict[str, list[str]]) -> list[Any]:
    found: list[Any] = []
    for parent in traces["parents"]:
        experiment_id = client.get_run(parent).info.experiment_id
        found += client.search_logged_models([experiment_id], f"source_run_id = '{parent}'", max_results=1000)
    return [model for model in found if model.model_id in traces["models"]]


def _artifacts(uri: str) -> Any:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(uri)
