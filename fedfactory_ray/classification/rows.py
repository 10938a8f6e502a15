"""Training rows of a classifier: a Ray data set of (image, label), held in memory in one order, or streamed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import ray
import torch
from torch import Tensor

from fedfactory_ray.storage import Storage
from fedfactory_ray.synthesis.synthesize import Shard

FILES_PER_TASK = 16
ORDER = ("index", "unit", "client", "label")


@dataclass(frozen=True)
class Rows:
    """A data set. Columns: image (uint8 H×W×C), label, client, unit, index; `digest` names its content."""

    dataset: ray.data.Dataset
    digest: str
    images: int
    unit_size: int


def validates(columns: dict[str, np.ndarray], unit_size: int, fraction: float) -> np.ndarray:
    """Which rows validate, bool (n,): of each client's images of a class, every (1/fraction)-th.

    A row's side depends on its own place alone, so it stays when other rows come or go.
    """
    period = round(1 / fraction)
    return (columns["unit"] * unit_size + columns["index"]) % period == period - 1


def keep_side(
    columns: dict[str, np.ndarray], unit_size: int, fraction: float, validation: bool
) -> dict[str, np.ndarray]:
    """The training or the validation rows of a batch of columns."""
    chosen = validates(columns, unit_size, fraction) == validation
    return {name: column[chosen] for name, column in columns.items()}


def shard_rows(storage: Storage, manifest: list[Shard], digest: str, unit_size: int) -> Rows:
    """Rows of the synthetic Parquet shards, read by one task for every FILES_PER_TASK of them."""
    dataset = ray.data.read_parquet(
        [storage.path(shard.file) for shard in manifest],
        filesystem=storage.filesystem,
        columns=["image", "label", "client", "unit", "index"],
        override_num_blocks=math.ceil(len(manifest) / FILES_PER_TASK),
    )
    return Rows(dataset, digest, sum(shard.n for shard in manifest), unit_size)


def read_columns(rows: Any) -> dict[str, np.ndarray]:
    """All rows of a worker's data set shard, as columns in memory."""
    batches = [batch for batch in rows.iter_batches(batch_size=None, batch_format="numpy") if len(batch["label"])]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in (*ORDER, "image")}


class Batches(Protocol):
    """One side (training or validation) of the rows, as a worker sees it."""

    def epoch(self, epoch: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """This worker's part of each global batch: uint8 images (n, H, W, C) and int64 labels (n,).

        `epoch` seeds the shuffling of training rows, whose last, incomplete batch is left out; None reads every row
        once, in order.
        """


class HeldBatches:
    """Rows held as uint8, in an order that depends on what they are and not on how they came."""

    def __init__(self, columns: dict[str, np.ndarray], batch_size: int, seed: int, rank: int, world: int) -> None:
        order = np.lexsort([columns[name] for name in ORDER])
        self.images = torch.from_numpy(columns["image"][order])
        self.labels = torch.from_numpy(columns["label"][order].astype(np.int64))
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world

    def epoch(self, epoch: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """See Batches: every worker shuffles alike and takes its rank's part of each batch."""
        n, size = len(self.labels), self.batch_size
        order = torch.arange(n)
        if epoch is not None:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed + epoch))
            size = min(size, n)
            n -= n % size
        for start in range(0, n, size):
            chosen = order[start : min(start + size, n)][self.rank :: self.world]
            yield self.images[chosen], self.labels[chosen]


class StreamedBatches:
    """Rows read anew each epoch, for what does not fit: shuffled within a buffer of 16 batches."""

    def __init__(self, rows: Any, batch_size: int, seed: int, steps: int) -> None:
        self.rows, self.batch_size, self.seed, self.steps = rows, batch_size, seed, steps

    def epoch(self, epoch: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """See Batches; all workers take the same number of training steps."""
        shuffle: dict[str, Any] = {}
        if epoch is not None:
            shuffle = {
                "local_shuffle_buffer_size": 16 * self.batch_size,
                "local_shuffle_seed": self.seed + epoch,
                "drop_last": True,
            }
        for step, batch in enumerate(
            self.rows.iter_batches(batch_size=self.batch_size, batch_format="numpy", **shuffle)
        ):
            if epoch is not None and step == self.steps:
                return
            yield torch.as_tensor(batch["image"]), torch.as_tensor(batch["label"]).long()
