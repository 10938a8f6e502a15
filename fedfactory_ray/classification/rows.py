"""Training rows of a classifier: (image, label) and each image's place, read where they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import ray

from fedfactory_ray.classification.sides import keep_side
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.synthesis.shard import Shard, read_shards

FILES_PER_TASK = 16


@dataclass(frozen=True)
class Rows:
    """Rows with the columns image (flat uint8), label, client, unit, index; `digest` names their content.

    `table` reads them all, in the process that calls it; `dataset` has Ray Data read them piece by piece, for rows that
    do not fit in memory. Both pickle.
    """

    table: Callable[[], pa.Table]
    dataset: Callable[[], ray.data.Dataset]
    digest: str
    n_images: int
    unit_size: int


def shard_rows(storage: Storage, manifest: list[Shard], digest: str, unit_size: int) -> Rows:
    """Rows of the synthetic Parquet shards."""
    files = [shard.file for shard in manifest]
    n_images = sum(shard.n for shard in manifest)
    return Rows(partial(read_shards, storage, files), partial(_stream, storage, files), digest, n_images, unit_size)


def validation_rows(storage: Storage, manifest: list[Shard], unit_size: int, fraction: float) -> Callable[[], pa.Table]:
    """Reads the rows of the shards that validate, where it is called."""
    return partial(_validating, storage, [shard.file for shard in manifest], unit_size, fraction)


def _validating(storage: Storage, files: list[str], unit_size: int, fraction: float) -> pa.Table:
    # File by file, so that the other rows are never held together.
    sides = (keep_side(read_shards(storage, [file]), unit_size, fraction, validation=True) for file in files)
    return pa.concat_tables(sides)


def _stream(storage: Storage, files: list[str]) -> ray.data.Dataset:
    """The shards as a data set, read by one task for every FILES_PER_TASK of them."""
    return ray.data.read_parquet(
        [storage.path(file) for file in files],
        filesystem=storage.filesystem,
        columns=["image", "label", "client", "unit", "index"],
        override_num_blocks=math.ceil(len(files) / FILES_PER_TASK),
    )
