"""MLflow: one parent run a job, a child run for each client and phase. The driver alone writes."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfactory_ray.settings.config import Config, flatten

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from torch import nn


DESCRIPTION = "mlflow.note.content"
"""Tag that MLflow's pages show as a run's description."""
SQLITE = "sqlite:///"
BATCH = 900  # MLflow takes 1000 metrics a call
FLUSH_SECONDS = 5.0
"""Curves that grow are sent no more often: with many clients the driver would do little else."""


def tracking_uri(config: Config) -> str:
    """Where runs are logged: the config's URI, else MLFLOW_TRACKING_URI, else a local sqlite file; `~` in a sqlite
    file's path is the user's home."""
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    return SQLITE + os.path.expanduser(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else uri


class Run:
    """One MLflow run: parameters, metrics, files and children."""

    def __init__(self, client: Any, experiment_id: str, run_id: str) -> None:
        self.client, self.experiment_id, self.id = client, experiment_id, run_id
        self.parent: Run | None = None
        self.running_children: dict[str, Run] = {}
        self.waiting: list[tuple[str, int, float]] = []
        self.flushed = time.monotonic()

    def child(self, name: str) -> Run:
        """Start a run nested below this one."""
        tags = {"mlflow.parentRunId": self.id}
        run = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
        child = Run(self.client, self.experiment_id, run.info.run_id)
        self.running_children[child.id] = child
        child.parent = self
        return child

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters."""
        from mlflow.entities import Param

        entities = [Param(name, str(value)) for name, value in values.items()]
        for start in range(0, len(entities), 100):
            self.client.log_batch(self.id, params=entities[start : start + 100])

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log one value a metric."""
        self.curves((name, step, value) for name, value in values.items())

    def curves(self, points: Iterable[tuple[str, int, float]]) -> None:
        """Log many points (metric, step, value) in few calls."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entities = [Metric(name, float(value), now, step) for name, step, value in points]
        for start in range(0, len(entities), BATCH):
            self.client.log_batch(self.id, metrics=entities[start : start + BATCH])

    def grow(self, points: Iterable[tuple[str, int, float]]) -> None:
        """Log points of curves that grow: every FLUSH_SECONDS, and when the run ends."""
        self.waiting += points
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send the points that wait."""
        self.curves(self.waiting)
        self.waiting, self.flushed = [], time.monotonic()

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""
        self.client.set_tag(self.id, name, value)

    def figure(self, figure: Figure, file: str) -> None:
        """Log a picture."""
        self.client.log_figure(self.id, figure, file)

    def json(self, value: Any, file: str) -> None:
        """Log a JSON document."""
        self.client.log_dict(self.id, value, file)

    def text(self, text: str, file: str) -> None:
        """Log a text."""
        self.client.log_text(self.id, text, file)

    def model(
        self,
        name: str,
        predictor: nn.Module,
        example: np.ndarray,
        class_names: Sequence[str],
        prior: np.ndarray,
        made_of: Mapping[str, Any],
    ) -> str:
        """Log a classifier with its signature, as an exported program (no pickle); returns its URI.

        `predictor` gives log-probabilities with the classes alike; `prior`, (classes,), is the announced one. Load it
        with `mlflow.pyfunc.load_model(uri).predict(images)`: uint8 (n, H, W, C) in, probabilities out, a DataFrame with
        a column a class by its name, on a CUDA device where there is one, else, or with `model_config={"device":
        "cpu"}`, on the CPU. Its `params` choose the prior, see `ServedClassifier.predict`. `made_of` is kept as the
        model's metadata.
        """
        import mlflow
        import pandas as pd
        import torch
        from mlflow.environment_variables import MLFLOW_DEFAULT_PREDICTION_DEVICE as DEVICE

        from fedfactory_ray.tracking import served_classifier

        images = torch.from_numpy(example)
        with torch.inference_mode():
            probabilities = pd.DataFrame(predictor.eval()(images).exp().numpy(), columns=list(class_names))
        signature = mlflow.models.infer_signature(example, probabilities)
        signature.params = served_classifier.PARAMS
        traced = torch.cat([images, images])  # an export takes a batch of one for a constant
        program = torch.export.export(predictor, (traced,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        with tempfile.TemporaryDirectory() as folder, mlflow.start_run(run_id=self.id), ExitStack() as ending:
            # MLflow tries the model here, and the driver was given no GPU.
            ending.callback(partial(DEVICE.set, asked) if (asked := DEVICE.get()) else DEVICE.unset)
            DEVICE.set("cpu")
            file = Path(folder, "model.pt2")
            beside = {served_classifier.NAMES: list(class_names), served_classifier.PRIOR: prior.tolist()}
            torch.export.save(program, file, extra_files={name: json.dumps(value) for name, value in beside.items()})
            info = mlflow.pyfunc.log_model(
                name=name,
                loader_module=Path(served_classifier.__file__).stem,
                data_path=str(file),
                code_paths=[served_classifier.__file__],
                model_config={"device": None},
                signature=signature,
                input_example=example,
                metadata=dict(made_of),
                pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", "mlflow"],
            )
        return str(info.model_uri)

    def end(self, status: str = "FINISHED", why: str = "") -> None:
        """End the run and the children that still run: FINISHED, FAILED or KILLED; `why` becomes its description."""
        for child in list(self.running_children.values()):
            child.end(status)
        try:
            self.flush()
            if why:
                self.tag(DESCRIPTION, why)
        finally:
            self.client.set_terminated(self.id, status)
            if self.parent is not None:
                del self.parent.running_children[self.id]


class ClientRun:
    """The MLflow run of one client: loss curves while it trains, its modules and its picture at the end."""

    def __init__(self, parent: Future[Run], client: str) -> None:
        self.parent, self.client = parent, client
        self.early: list[tuple[str, int, float]] = []
        self.tags: dict[str, str] = {}

    @cached_property
    def run(self) -> Run:
        """The client's own run, once the job's has started; it takes what came before."""
        run = self.parent.result().child(self.client)
        run.grow(self.early)
        self.early = []
        return run

    def progress(self, event: Any) -> None:
        """Take a point of a loss curve (a client's `Progress`)."""
        self._grow(f"loss_class_{event.label}", event.step, event.loss)

    def upload(self, event: Any) -> None:
        """Take the seconds of a module, and where it was trained (a client's `Upload`)."""
        self._grow(f"seconds_class_{event.card.label}", event.card.steps, event.seconds)
        self.tags = {"node": event.node, "gpus": ",".join(event.gpus)}

    def _grow(self, *point: Any) -> None:
        if self.parent.done():
            self.run.grow([point])
        else:
            self.early.append(point)

    def finish(self, cards: list[Any], grid: Figure | None) -> None:
        """Log the client's modules and its picture, if images were drawn of them, and end its run."""
        run = self.run
        run.metrics(
            {
                "images": sum(c.n_images for c in cards),
                "uploaded_bytes": sum(c.size for c in cards),
                "modules": len(cards),
            }
        )
        for name, value in self.tags.items():
            run.tag(name, value)
        run.json([vars(card) for card in cards], "modules.json")
        if grid is not None:
            run.figure(grid, "samples.png")
        run.end()


def expert_run(client: str) -> str:
    """Name of the run of a client's expert; that of its modules has the client's own name."""
    return f"expert-{client}"


class Curves:
    """The curves of one fit or method in its MLflow run. Each step is logged once, as it comes; those of an earlier
    start afterwards. The field `step` of a record (`epoch`, `round`) numbers it, the other fields are its figures."""

    def __init__(self, run: Run, step: str) -> None:
        self.run, self.step = run, step
        self.logged: set[int] = set()

    def add(self, done: Any) -> None:
        """Log a step's figures, unless an attempt that broke off told them already."""
        number = getattr(done, self.step)
        if number not in self.logged:
            self.logged.add(number)
            figures = {k: v for k, v in vars(done).items() if k not in (self.step, f"{self.step}s") and v is not None}
            self.run.grow((name, number, value) for name, value in figures.items())

    def rest(self, history: Iterable[Any]) -> None:
        """Log the steps of a history that are not logged yet."""
        for done in history:
            self.add(done)


FOLDER = "fedfactory.folder"
"""Tag of a job's run: the run's folder in storage."""


def start_run(config: Config, name: str, folder: str, parent: str | None = None) -> Run:
    """Start a job's run, tagged with its `folder`, below the run of id `parent` if there is one; log every setting."""
    client, experiment_id = tracking_client(config)
    tags = {FOLDER: folder} | ({"mlflow.parentRunId": parent} if parent else {})
    created = client.create_run(experiment_id, run_name=name, tags=tags)
    run = Run(client, experiment_id, created.info.run_id)
    run.params(flatten(config.model_dump(mode="json")))
    return run


def runs_of(client: MlflowClient, experiment_id: str, folder: str) -> list[str]:
    """Ids of the jobs' runs whose folder is `folder`, the newest first, also of those that were deleted there."""
    from mlflow.entities import ViewType

    # MLflow's filters know no escape for a quote: `_` stands for any character, so look at what comes back.
    pattern = folder.replace("'", "_")
    alike = client.search_runs([experiment_id], f"tags.`{FOLDER}` LIKE '{pattern}'", ViewType.ALL)
    return [run.info.run_id for run in alike if run.data.tags.get(FOLDER) == folder]


def read_artifact(client: MlflowClient, run_id: str, name: str) -> bytes | None:
    """Content of a run's file; None where it has none of that name."""
    if name not in {file.path for file in client.list_artifacts(run_id)}:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run_id, name, folder)).read_bytes()


def tracking_client(config: Config) -> tuple[MlflowClient, str]:
    """A client of the configured tracking server, and the id of the experiment.

    A new experiment of a sqlite store keeps its files in mlruns/ beside the store, not where the job happens to run.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    import mlflow

    uri, name = tracking_uri(config), config.tracking.experiment
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    if uri.startswith(SQLITE) and client.get_experiment_by_name(name) is None:
        files = Path(uri.removeprefix(SQLITE)).absolute().parent / "mlruns" / name.lstrip("/")
        client.create_experiment(name, artifact_location=files.as_uri())
    return client, mlflow.set_experiment(name).experiment_id
