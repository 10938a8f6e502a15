"""The training loop of a classifier's fit, in whatever process: what it works on, and the epochs that come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray.train

from fedfactory_ray.classification.batches import Batches, HeldBatches, StreamedBatches
from fedfactory_ray.classification.card import Epoch
from fedfactory_ray.classification.sides import keep_side
from fedfactory_ray.cluster.failures import failures_refused
from fedfactory_ray.data.readers import open_source
from fedfactory_ray.data.source import Task
from fedfactory_ray.seeds import derive_seed
from fedfactory_ray.settings.config import Config
from fedfactory_ray.synthesis.shard import image_table

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from torch import nn

REMEDY = "a smaller classifier.batch_size, more resources.classifier_workers, or resources.classifier.num_gpus=1"


def itself(network: nn.Module) -> nn.Module:
    """The network of one worker, which has nobody to average gradients with."""
    return network


@dataclass(frozen=True)
class Loop:
    """A fit of one name: its recipe, its rows (`table` reads them, where workers hold them; else Ray Train streams
    them), and whether every epoch is also judged on the real validation split."""

    name: str
    config: Config
    task: Task
    steps: int
    threads: int
    gpu: bool
    table: Callable[[], pa.Table] | None
    unit_size: int
    judged: bool

    def epochs(
        self,
        device: torch.device,
        kept: Mapping[str, bytes],
        keep: Callable[[Epoch, dict[str, bytes]], None],
        rank: int = 0,
        world: int = 1,
        wrap: Callable[[nn.Module], nn.Module] = itself,
    ) -> Iterator[Epoch]:
        """The epochs of one worker, on behind the files `kept` of a checkpoint. Every few epochs, and after the last,
        `keep` is given a checkpoint's files, which are empty but on the first worker; `wrap` averages the workers'
        gradients. Raises FedFactoryError."""
        from fedfactory_ray.classification.fitting import Fit

        seed = derive_seed(self.config.seed, "classifier")
        with failures_refused(f"the fit of {self.name}", REMEDY):
            training, validation = self._batches(seed, rank, world)
            real = self._real_batches(rank, world) if self.judged else None
            fit = Fit(self.config.classifier, self.task, self.steps, seed, device, rank, world, wrap)
            if kept:
                fit.load(kept)
            for epoch in fit.epochs(training, validation, real):
                if epoch.epoch % self.config.storage.checkpoint_epochs == 0 or epoch.epoch == epoch.epochs:
                    keep(epoch, fit.save() if rank == 0 else {})
                yield epoch

    def _batches(self, seed: int, rank: int, world: int) -> tuple[Batches, Batches]:
        """Training and validation batches of a worker."""
        size, fraction = self.config.classifier.batch_size, self.config.classifier.validation_fraction
        shape = self.task.image_shape
        if self.table is not None:
            table = self.table()
            sides = (keep_side(table, self.unit_size, fraction, validation=side) for side in (False, True))
            training, validation = (HeldBatches(side, shape, size, seed, rank, world) for side in sides)
            return training, validation
        return (
            StreamedBatches(ray.train.get_dataset_shard("train"), shape, size // world, seed, self.steps),
            StreamedBatches(ray.train.get_dataset_shard("validation"), shape, size, seed, self.steps),
        )

    def _real_batches(self, rank: int, world: int) -> Batches:
        """The real validation split, every worker its part."""
        source = open_source(self.config.data)
        table = image_table(source.images("val"), source.labels("val"), "real")
        return HeldBatches(table, self.task.image_shape, self.config.classifier.batch_size, 0, rank, world)
