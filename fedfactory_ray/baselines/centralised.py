"""Centralised training: the same classifier on all real training images, the upper bound that breaks the silos."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pyarrow as pa
import ray

from fedfactory_ray.classification.rows import Rows
from fedfactory_ray.config import Config
from fedfactory_ray.data.partition import Partition
from fedfactory_ray.data.source import DataInfo

BLOCK_BYTES = 64 * 2**20


def real_rows(config: Config, partition: Partition, info: DataInfo) -> Rows:
    """All images of the partition as a classifier's rows. Tasks read them; the driver holds references."""
    indices = np.concatenate([share for _, _, share in partition])
    image_bytes = info.channels * info.resolution**2
    blocks = np.array_split(indices, math.ceil(len(indices) * image_bytes / BLOCK_BYTES))
    starts = np.cumsum([0, *(len(block) for block in blocks[:-1])])
    references = [_read_block.remote(config, block, int(start)) for block, start in zip(blocks, starts, strict=True)]
    digest = hashlib.sha256(f"real\n{config.data.source}\n{info}\n{partition.sha256}".encode()).hexdigest()
    return Rows(ray.data.from_arrow_refs(references), digest, len(indices), len(indices))


@ray.remote(scheduling_strategy="DEFAULT")  # else it waits for room in the placement group of a tuner's trial
def _read_block(config: Config, indices: np.ndarray, start: int) -> pa.Table:
    from fedfactory_ray.data.sources import open_source
    from fedfactory_ray.synthesis.shard import image_table

    source = open_source(config.data)
    indices = np.sort(indices)
    return image_table(source.images("train", indices), source.labels("train")[indices], "real", start)
