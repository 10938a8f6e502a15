"""Batches of a fit: rows held in memory in one order, or streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from fedfactory_ray.synthesis.shard import images_of

ORDER = ("label", "client", "unit", "index")


class Batches(Protocol):
    """One side (training or validation) of the rows, as a worker sees it."""

    def to(self, device: torch.device) -> None:
        """Hand batches out for use on `device`."""

    def epoch(self, epoch: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """This worker's part of each global batch: uint8 images (n, H, W, C) and int64 labels (n,).

        `epoch` seeds the shuffling of training rows, whose last, incomplete batch is left out; None reads every row
        once, in order.
        """


class Held:
    """Rows held in memory: uint8 images (n, H, W, C), int64 labels (n,). Subclasses choose the order."""

    images: Tensor
    labels: Tensor
    batch_size: int
    on_gpu = False

    def to(self, device: torch.device) -> None:
        """See Batches: on a GPU the rows lie there, where they take no more than a quarter of what is free."""
        self.on_gpu = device.type == "cuda"
        if self.on_gpu and self.images.nbytes <= torch.cuda.mem_get_info(device)[0] // 4:
            self.images, self.labels = self.images.to(device), self.labels.to(device)

    def gather(self, order: Tensor, size: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows in this order (n,), in batches of `size`; of each, the share of one rank."""
        for batch in order.to(self.images.device).split(size):
            chosen = batch[rank::world]
            if len(chosen):
                yield self.images[chosen], self.labels[chosen]

    @property
    def reading_size(self) -> int:
        """Images a batch that is only judged: on a GPU more, for launches cost more than images there. Where the rows
        lie makes no difference, for bytes may depend on a batch's size."""
        return self.batch_size * (4 if self.on_gpu else 1)


class HeldBatches(Held):
    """Rows held as uint8, in an order that depends on what they are and not on how they came."""

    def __init__(
        self, table: pa.Table, shape: tuple[int, int, int], batch_size: int, seed: int, rank: int, world: int
    ) -> None:
        order = pc.sort_indices(table, sort_keys=[(name, "ascending") for name in ORDER]).to_numpy()
        self.images = torch.from_numpy(images_of(table, shape)[order])
        self.labels = torch.from_numpy(table["label"].to_numpy()[order].astype(np.int64))
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world

    def epoch(self, epoch: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """See Batches: every worker shuffles alike and takes its rank's part of each batch."""
        n = len(self.labels)
        if epoch is None:
            return self.gather(torch.arange(n), self.reading_size, self.rank, self.world)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed + epoch))
        # Gradients of the workers are averaged as they are, so all have as many rows.
        size = min(self.batch_size, n) // self.world * self.world
        return self.gather(order[: n - n % size], size, self.rank, self.world)


@dataclass(frozen=True)
class Group:
    """Images of one class and origin, uint8 (n, H, W, C), and how many of them an epoch shows."""

    label: int
    images: np.ndarray
    shown: int


class BalancedBatches(Held):
    """Groups held as uint8. Each epoch draws `shown` images per group without replacement, starting over when a group
    runs out."""

    def __init__(self, groups: Sequence[Group], batch_size: int, seed: int) -> None:
        self.images = torch.from_numpy(np.concatenate([group.images for group in groups]))
        self.labels = torch.from_numpy(np.repeat([group.label for group in groups], [len(g.images) for g in groups]))
        self.sizes = [(len(group.images), group.shown) for group in groups]
        self.batch_size, self.seed = batch_size, seed
        self.shown = sum(group.shown for group in groups)

    @property
    def steps(self) -> int:
        """Training batches an epoch."""
        return max(1, self.shown // self.batch_size)

    def epoch(self, epoch: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """See Batches; None shows the same images each time, as many of each group as a training epoch would."""
        draw = torch.Generator().manual_seed(self.seed + (epoch or 0))
        start, chosen = 0, []
        for n, shown in self.sizes:
            rounds = [start + torch.randperm(n, generator=draw) for _ in range(-(-shown // n))]
            chosen.append(torch.cat(rounds)[:shown])
            start += n
        order = torch.cat(chosen)
        if epoch is None:
            return self.gather(order, self.reading_size)
        order, size = order[torch.randperm(len(order), generator=draw)], min(self.batch_size, len(order))
        return self.gather(order[: self.steps * size], size)


class StreamedBatches:
    """Rows read anew each epoch, for what does not fit: shuffled within a buffer of 16 batches."""

    def __init__(self, rows: Any, shape: tuple[int, int, int], batch_size: int, seed: int, steps: int) -> None:
        self.rows, self.shape, self.batch_size, self.seed, self.steps = rows, shape, batch_size, seed, steps
        self.pinned = False

    def to(self, device: torch.device) -> None:
        """See Batches: copies to a GPU start from pinned memory, so that nothing waits for them."""
        self.pinned = device.type == "cuda"

    def epoch(self, epoch: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """See Batches; all workers take the same number of training steps."""
        shuffle: dict[str, Any] = {}
        if epoch is not None:
            shuffle = {
                "local_shuffle_buffer_size": 16 * self.batch_size,
                "local_shuffle_seed": self.seed + epoch,
                "drop_last": True,
            }
        batches = self.rows.iter_batches(batch_size=self.batch_size, batch_format="pyarrow", **shuffle)
        for step, batch in enumerate(batches):
            if epoch is not None and step == self.steps:
                return
            images, labels = torch.tensor(images_of(batch, self.shape)), torch.tensor(batch["label"].to_numpy()).long()
            yield (images.pin_memory(), labels.pin_memory()) if self.pinned else (images, labels)
