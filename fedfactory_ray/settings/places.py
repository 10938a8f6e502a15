"""The sections that tell where a run happens and is kept. Of these, bytes depend on threads, on the number of workers,
and on whether a training set is held in memory."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from fedfactory_ray.settings.sections import Section


class WorkerResources(Section):
    """What one actor or worker asks of Ray."""

    num_cpus: float = Field(1.0, gt=0)
    """CPUs that Ray sets aside."""
    threads: int = Field(1, ge=1)
    """Torch threads; results may depend on it."""
    num_gpus: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """A GPU, or a fraction to share one; `auto`: 0 where the cluster has none, else a whole one to fit a classifier,
    and for clients and synthesis a fraction where several small ones fit on a GPU."""

    @field_validator("num_gpus", mode="before")
    @classmethod
    def _null_is_auto(cls, num_gpus: Any) -> Any:
        return "auto" if num_gpus is None else num_gpus

    @field_validator("num_gpus")
    @classmethod
    def _one_process_one_gpu(cls, num_gpus: float | str) -> float | str:
        if num_gpus != "auto" and float(num_gpus) > 1:
            raise ValueError(
                "at most 1, for a process computes on one GPU: a module is trained on one; a fit takes several by "
                "resources.classifier_workers"
            )
        return num_gpus


class ResourcesConfig(Section):
    """Resources of each phase; the same file serves a laptop and a cluster.

    On several GPUs run as many clients and synthesis actors side by side as there is room for, and one fit, by
    `classifier_workers` (Ray Train). One module is trained on one GPU, or on a part of it.
    """

    client: WorkerResources = WorkerResources()
    """A client's actor."""
    synthesis: WorkerResources = WorkerResources()
    """A synthesis actor."""
    classifier: WorkerResources = WorkerResources()
    """A Ray Train worker."""
    classifier_workers: int = Field(1, ge=1)
    """Number of Ray Train workers; part of what determines the classifier."""
    max_actors: int | None = Field(None, ge=1)
    """Upper bound of the client and of the synthesis actors; default: as many as fit."""
    in_memory_mb: int = Field(4096, ge=0)
    """A classifier's training set up to this size is held in each worker as uint8; a larger one is streamed, in an
    order that is not promised to repeat."""
    attempts: int = Field(3, ge=1)
    """How often a client's work, or a fit, is begun before it is given up, should its process or node die each time."""
    away_seconds: float = Field(600.0, gt=0)
    """A natural silo that no living node may read for so long is given up."""
    on_divergence: Literal["refuse", "leave_out"] = "refuse"
    """What becomes of a run when the training of a client's module diverges: it ends and tells which; or it goes on
    without that module, and tells so wherever it tells results."""
    scale_up_seconds: float = Field(900.0, gt=0)
    """How long a job waits for the nodes that the cluster's autoscaler was asked for."""

    def holds(self, n_images: int, image_shape: tuple[int, int, int]) -> bool:
        """Whether each worker of a fit holds a training set of such images, instead of reading it anew each epoch."""
        return n_images * math.prod(image_shape) <= self.in_memory_mb * 2**20


class StorageConfig(Section):
    """Where a run is kept."""

    uri: str = "runs"
    """Folder of all runs: a local path, a shared folder, or an s3:// or gs:// address."""
    scratch: str = "~/.cache/fedfactory"
    """Folder for the checkpoints of a natural silo, and of jobs/train_client.py, on the node that trains: they hold
    optimiser states, and go nowhere else. `~` is the home there. Simulated clients keep theirs in the run's folder."""
    checkpoint_seconds: float = Field(60.0, gt=0)
    """Time between the checkpoints of a module's training, from which it goes on after a failure."""
    checkpoint_epochs: int = Field(5, ge=1)
    """Epochs between the checkpoints of a classifier's or an expert's fit."""
    checkpoint_rounds: int = Field(10, ge=1)
    """Rounds between the checkpoints of a federated method."""

    @field_validator("uri")
    @classmethod
    def _is_an_address(cls, uri: str) -> str:
        if not uri.strip() or not uri.isprintable():
            raise ValueError(f"uri {uri!r:.100}: needed a path or an address that can be printed")
        return uri

    @field_validator("scratch")
    @classmethod
    def _lies_on_the_node(cls, scratch: str) -> str:
        if not scratch.startswith(("/", "~")) or not scratch.isprintable():
            raise ValueError(f"scratch {scratch!r:.100}: needed a folder of the node's own, from / or ~ on")
        return scratch


class TrackingConfig(Section):
    """Where the run is logged."""

    uri: str | None = None
    """MLflow tracking URI; default: $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db."""
    experiment: str = "fedfactory"
    """MLflow experiment."""
    real_images: Literal["auto", "shown", "hidden"] = "auto"
    """Whether pictures show real test images beside synthetic ones; `auto`: only where one place holds all images
    anyway (neither partition `natural` nor modules from files)."""

    @field_validator("experiment")
    @classmethod
    def _names_a_folder(cls, experiment: str) -> str:
        # A local store keeps the experiment's files in a folder of this name.
        if {"", ".", ".."} & set(experiment.removeprefix("/").split("/")) or not experiment.isprintable():
            raise ValueError(f"experiment {experiment!r:.100}: needed a name, of parts between / that name folders")
        return experiment
