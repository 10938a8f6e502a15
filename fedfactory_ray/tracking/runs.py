"""MLflow: one parent run a job, a child run for each client and phase. The driver alone writes."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock

from fedfactory_ray.errors import TrackingError
from fedfactory_ray.settings.config import Config, flatten
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.tracking.outbox import PARENT, Outbox
from fedfactory_ray.tracking.patience import first_line, troubles

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from torch import nn


T = TypeVar("T")
DESCRIPTION = "mlflow.note.content"
"""Tag that MLflow's pages show as a run's description."""
MLFLOW_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # By default a server that is away is tried for minutes, in each call.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}
"""Environment variables of MLflow that a person's own win over."""
STORE_SECONDS = 120.0
"""How long another process may take to make a new store's tables."""
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
    """One MLflow run: parameters, metrics, tags, files and children. What its server does not take waits in the outbox,
    but for files: the same command logs those anew."""

    def __init__(self, outbox: Outbox, key: str) -> None:
        self.outbox, self.key, self.client, self.patience = outbox, key, outbox.client, outbox.patience
        self.parent: Run | None = None
        self.running_children: list[Run] = []
        self.waiting: list[tuple[str, int, float]] = []
        self.flushed = time.monotonic()

    @property
    def id(self) -> str:
        """MLflow's id; empty until the server has taken that the run began."""
        return self.outbox.ids.get(self.key, "")

    def _file(self, call: Callable[..., T], *arguments: Any, otherwise: T) -> T:
        """What a call about this run returns that sends a file; `otherwise` where the server does not take it."""
        taken: list[T] = []

        def send() -> bool:
            taken.append(call(self.id, *arguments))
            return True

        if not (self.id and self.patience.attempt(send, otherwise=False)):
            self.patience.missed += 1
        return taken[0] if taken else otherwise

    def child(self, name: str) -> Run:
        """Start a run nested below this one."""
        child = Run(self.outbox, self.outbox.begin(name, {PARENT: self.key}))
        self.running_children.append(child)
        child.parent = self
        return child

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters."""
        texts = [(name, str(value)) for name, value in values.items()]
        for start in range(0, len(texts), 100):
            self.outbox.send("params", self.key, texts=dict(texts[start : start + 100]))

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log one value a metric."""
        self.curves((name, step, value) for name, value in values.items())

    def curves(self, points: Iterable[tuple[str, int, float]]) -> None:
        """Log many points (metric, step, value) in few calls."""
        now = int(time.time() * 1000)
        timed = [(name, int(step), float(value), now) for name, step, value in points]
        for start in range(0, len(timed), BATCH):
            self.outbox.send("points", self.key, points=timed[start : start + BATCH])

    def grow(self, points: Iterable[tuple[str, int, float]]) -> None:
        """Log points of curves that grow: every FLUSH_SECONDS, and when the run ends."""
        self.waiting += points
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send the points that wait."""
        self.curves(self.waiting)
        self.waiting = []
        self.flushed = time.monotonic()

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""
        self.outbox.send("tag", self.key, texts={name: value})

    def figure(self, figure: Figure, file: str) -> None:
        """Log a picture."""
        self._file(self.client.log_figure, figure, file, otherwise=None)

    def json(self, value: Any, file: str) -> None:
        """Log a JSON document."""
        self._file(self.client.log_dict, value, file, otherwise=None)

    def text(self, text: str, file: str) -> None:
        """Log a text."""
        self._file(self.client.log_text, text, file, otherwise=None)

    def model(
        self,
        name: str,
        predictor: nn.Module,
        example: np.ndarray,
        class_names: Sequence[str],
        prior: np.ndarray,
        made_of: Mapping[str, Any],
    ) -> str:
        """Log a classifier with its signature, as an exported program (no pickle); returns its URI, empty where the
        server did not take it.

        `example` are synthetic images, uint8 (n, H, W, C), which are logged too: no real one is. `predictor` gives
        log-probabilities with the classes alike; `prior`, (classes,), is the announced one. Load it
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
        beside = {served_classifier.NAMES: list(class_names), served_classifier.PRIOR: prior.tolist()}

        def send(run_id: str) -> str:
            with mlflow.start_run(run_id=run_id):
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

        with tempfile.TemporaryDirectory() as folder, ExitStack() as ending:
            # MLflow tries the model here, and the driver was given no GPU.
            ending.callback(partial(DEVICE.set, asked) if (asked := DEVICE.get()) else DEVICE.unset)
            DEVICE.set("cpu")
            file = Path(folder, "model.pt2")
            torch.export.save(program, file, extra_files={name: json.dumps(value) for name, value in beside.items()})
            return self._file(send, otherwise="")

    def end(self, status: str = "FINISHED", why: str = "") -> None:
        """End the run and the children that still run: FINISHED, FAILED or KILLED; `why` becomes its description. The
        end of a job's run waits for its server once, see Outbox.conclude."""
        if self.parent is None:
            self.outbox.gather()
        for child in list(self.running_children):
            child.end(status)
        self.flush()
        if why:
            self.tag(DESCRIPTION, why)
        self.outbox.send("end", self.key, name=status)
        if self.parent is not None:
            self.parent.running_children.remove(self)
        else:
            self.outbox.conclude()


FOLDER = "fedfactory.folder"
"""Tag of a job's run: the run's folder in storage."""


def start_run(config: Config, name: str, folder: str, parent: str | None = None) -> Run:
    """Start a job's run, tagged with its `folder`, below the run of id `parent` if there is one; log every setting.
    What MLflow did not take of an earlier start in the folder is sent first."""
    client, experiment_id = tracking_client(config)
    outbox = Outbox(client, experiment_id, tracking_uri(config), Storage(folder))
    outbox.drain()  # what an earlier start could not tell
    outbox.patience.attempt(lambda: close_left(client, experiment_id, folder), otherwise=None)
    run = Run(outbox, outbox.begin(name, {FOLDER: folder} | ({PARENT: parent} if parent else {})))
    run.params(flatten(config.model_dump(mode="json")))
    return run


def close_left(client: MlflowClient, experiment_id: str, folder: str) -> None:
    """End as KILLED what starts of the run in `folder` that were killed left RUNNING; call it holding the folder."""
    for parent in runs_of(client, experiment_id, folder):
        mine = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'RUNNING'"
        left = [run.info.run_id for run in client.search_runs([experiment_id], mine, max_results=50_000)]
        if client.get_run(parent).info.status == "RUNNING":
            left.append(parent)
        for run_id in left:
            client.set_terminated(run_id, "KILLED")


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
    Raises TrackingError where the server does not answer in some seconds or is none.
    """
    for name, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(name, value)
    uri = tracking_uri(config)
    try:
        return _experiment(uri, config.tracking.experiment)
    except (ValueError, ImportError) as error:  # no address at all; or of a database without its driver
        raise TrackingError(uri, first_line(error)) from error
    except troubles() as error:
        raise TrackingError(uri, first_line(error)) from error


def _experiment(uri: str, name: str) -> tuple[MlflowClient, str]:
    import mlflow

    mlflow.set_tracking_uri(uri)
    if not uri.startswith(SQLITE):
        return mlflow.MlflowClient(), mlflow.set_experiment(name).experiment_id
    file = Path(uri.removeprefix(SQLITE)).absolute()
    # Two first starts on one new store would both make its tables.
    with FileLock(f"{file}.lock", timeout=STORE_SECONDS):
        client = mlflow.MlflowClient()
        if client.get_experiment_by_name(name) is None:
            files = file.parent / "mlruns" / name.lstrip("/")
            client.create_experiment(name, artifact_location=files.as_uri())
    return client, mlflow.set_experiment(name).experiment_id
