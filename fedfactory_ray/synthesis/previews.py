"""A few synthetic images of each module, for pictures."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import ray

from fedfactory_ray.storage.files import Storage
from fedfactory_ray.synthesis.shard import Shard, images_of


@ray.remote
def previews(
    storage: Storage, manifest: list[Shard], shape: tuple[int, int, int], most: int
) -> dict[tuple[str, int], np.ndarray]:
    """The first `most` images of each (client, class), uint8 (n, H, W, C)."""
    shown = {}
    for shard in manifest:
        if shard.unit == 0:
            table = pq.read_table(storage.path(shard.file), filesystem=storage.filesystem, columns=["image"])
            shown[shard.client, shard.label] = images_of(table.slice(0, most), shape).copy()
    return shown
