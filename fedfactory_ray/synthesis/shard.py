"""A shard: the Parquet file of one unit; rows are images with label and provenance."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedfactory_ray.storage.files import Storage
from fedfactory_ray.synthesis.plan import Unit

ROWS_DIGEST = b"fedfactory.rows_sha256"
SHAPE = b"fedfactory.shape"


def rows_digest(unit: Unit, images: np.ndarray) -> str:
    """SHA-256 of a unit's decoded rows: label, client, module, unit and index, shape and pixels."""
    header = f"{unit.label}\n{unit.client}\n{unit.module_sha256}\n{unit.index}\n{images.shape}\n"
    return hashlib.sha256(header.encode() + np.ascontiguousarray(images).tobytes()).hexdigest()


def image_column(images: np.ndarray) -> pa.FixedSizeListArray:
    """uint8 images (n, H, W, C) as an Arrow column of flat pixels, which pandas and Hugging Face datasets read too."""
    flat = pa.array(np.ascontiguousarray(images).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, int(np.prod(images.shape[1:])))


def image_table(images: np.ndarray, labels: np.ndarray, client: str, start: int = 0) -> pa.Table:
    """Images of `client` that no module drew, uint8 (n, H, W, C), as a classifier's rows, with places from `start`."""
    n = len(labels)
    return pa.table(
        {
            "image": image_column(images),
            "label": labels,
            "client": pa.array([client] * n),
            "unit": np.zeros(n, np.int64),
            "index": np.arange(start, start + n),
        }
    )


def images_of(table: pa.Table, shape: tuple[int, int, int]) -> np.ndarray:
    """Column `image` of a table as uint8 (n, H, W, C), read-only; `shape` is (H, W, C)."""
    column = table.column("image").combine_chunks()
    return column.flatten().to_numpy().reshape(-1, *shape)


def to_table(unit: Unit, images: np.ndarray) -> pa.Table:
    """Rows of a unit: image (H·W·C uint8), label, client, module (SHA-256), unit, index (in the unit); the schema's
    metadata holds the shape and the digest of the rows."""
    n = len(images)
    table = pa.table(
        {
            "image": image_column(images),
            "label": pa.array([unit.label] * n, pa.int64()),
            "client": pa.array([unit.client] * n, pa.string()),
            "module": pa.array([unit.module_sha256] * n, pa.string()),
            "unit": pa.array([unit.index] * n, pa.int64()),
            "index": pa.array(range(n), pa.int64()),
        }
    )
    shape = json.dumps(images.shape[1:]).encode()
    return table.replace_schema_metadata({ROWS_DIGEST: rows_digest(unit, images).encode(), SHAPE: shape})


def write_shard(storage: Storage, unit: Unit, images: np.ndarray) -> str:
    """Write a unit's file atomically; returns the digest of its rows."""
    table = to_table(unit, images)
    with storage.writing(unit.file) as stream:
        pq.write_table(table, stream, compression="zstd")
    return rows_digest(unit, images)


def read_shards(storage: Storage, files: list[str]) -> pa.Table:
    """Rows of several files, in their order: image, label, client, unit, index."""
    columns = {
        "image": pa.list_(pa.uint8(), 1),
        "label": pa.int64(),
        "client": pa.string(),
        "unit": pa.int64(),
        "index": pa.int64(),
    }
    if not files:
        return pa.schema(columns.items()).empty_table()
    shards = pq.ParquetDataset([storage.path(file) for file in files], filesystem=storage.filesystem)
    return shards.read([*columns]).replace_schema_metadata()


def verified_digest(storage: Storage, unit: Unit) -> str | None:
    """Digest of the rows of a unit's file, or None where the file is missing, torn, or not of this unit."""
    if not storage.exists(unit.file):
        return None
    try:
        table = pq.read_table(storage.path(unit.file), filesystem=storage.filesystem)
        height, width, channels = json.loads(table.schema.metadata[SHAPE])
        images = images_of(table, (height, width, channels))
        expected = to_table(unit, images)
        whole = (
            table.num_rows == unit.n and table.equals(expected) and table.schema.metadata == expected.schema.metadata
        )
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, AttributeError):  # each a way of being torn
        return None
    return rows_digest(unit, images) if whole else None


@dataclass(frozen=True)
class Shard:
    """One line of the manifest: a unit's file and what it holds."""

    file: str
    client: str
    label: int
    unit: int
    n: int
    module_sha256: str
    rows_sha256: str


def manifest_digest(manifest: list[Shard]) -> str:
    """SHA-256 of all rows, in order."""
    return hashlib.sha256("".join(shard.rows_sha256 for shard in manifest).encode()).hexdigest()
