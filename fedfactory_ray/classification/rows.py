"""Training rows of a classifier: a Ray data set of (image, label) and of each image's place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from fedfactory_ray.storage import Storage
from fedfactory_ray.synthesis.synthesize import Shard

FILES_PER_TASK = 16


@dataclass(frozen=True)
class Rows:
    """A data set. Columns: image (flat uint8), label, client, unit, index; `digest` names its content."""

    dataset: ray.data.Dataset
    digest: str
    images: int
    unit_size: int


def shard_rows(storage: Storage, manifest: list[Shard], digest: str, unit_size: int) -> Rows:
    """Rows of the synthetic Parquet shards, read by one task for every FILES_PER_TASK of them."""
    dataset = ray.data.read_parquet(
        [storage.path(shard.file) for shard in manifest],
        filesystem=storage.filesystem,
        columns=["image", "label", "client", "unit", "index"],
        override_num_blocks=math.ceil(len(manifest) / FILES_PER_TASK),
    )
    return Rows(dataset, digest, sum(shard.n for shard in manifest), unit_size)


def read_table(rows: Any) -> pa.Table:
    """All rows of a worker's data set shard, in memory."""
    return pa.concat_tables(rows.iter_batches(batch_size=None, batch_format="pyarrow")).combine_chunks()
