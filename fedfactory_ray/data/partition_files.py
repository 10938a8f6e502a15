"""A partition's files in a run's folder: who holds which images, as Parquet, and its digest and counts as JSON."""

from __future__ import annotations

from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedfactory_ray.data.partition import Partition, partition_summary
from fedfactory_ray.data.readers import MOST_CLASSES, MOST_ROWS
from fedfactory_ray.errors import StorageError
from fedfactory_ray.settings.data import NAME
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import INDICES, PARTITION

LARGEST = 2**26
"""Bytes of the digest and counts."""
COLUMNS = {"client": pa.string(), "label": pa.int32(), "index": pa.int64()}


class Summary(BaseModel):
    """The JSON file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    clients: Annotated[list[Annotated[str, Field(pattern=NAME)]], Field(min_length=1)]
    counts: Annotated[
        list[Annotated[list[Annotated[int, Field(ge=0, le=MOST_ROWS)]], Field(min_length=1, max_length=MOST_CLASSES)]],
        Field(min_length=1),
    ]


def save_partition(storage: Storage, partition: Partition) -> None:
    """Keep the partition."""
    with storage.writing(INDICES) as stream:
        pq.write_table(partition.to_table(), stream)
    storage.write_json(PARTITION, partition_summary(partition))


def read_partition(storage: Storage) -> Partition:
    """The partition that is kept. Raises StorageError where a file is missing or damaged, or the two do not agree; no
    more rows are read than the JSON file tells of."""
    needed = f"{PARTITION} and {INDICES} as they were written"

    def refuse(name: str, found: object) -> StorageError:
        return StorageError(f"{storage.uri}/{name}", f"{found}"[:300], needed)

    for name in (PARTITION, INDICES):
        if not storage.exists(name):
            raise refuse(name, "no file")
    if storage.size(PARTITION) > LARGEST:
        raise refuse(PARTITION, f"{storage.size(PARTITION)} bytes, at most {LARGEST} are one")
    try:
        summary = Summary.model_validate(storage.read_json(PARTITION))
    except ValidationError as error:
        problem = error.errors()[0]
        raise refuse(PARTITION, f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error
    rows = sum(map(sum, summary.counts))
    try:
        file = pq.ParquetFile(storage.path(INDICES), filesystem=storage.filesystem)
        schema, told = file.schema_arrow, file.metadata.num_rows
        if rows > MOST_ROWS or told != rows or {name: schema.field(name).type for name in schema.names} != COLUMNS:
            raise refuse(INDICES, f"{told} rows of {', '.join(schema.names)}, its counts are of {rows}")
        partition = Partition.from_table(file.read(), len(summary.counts[0]))
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:  # each a way of being no table
        raise refuse(INDICES, error) from error
    strange = {label for _, label, _ in partition} - set(range(partition.classes))
    if strange or partition_summary(partition) != summary.model_dump():
        raise refuse(INDICES, "another partition than its digest and counts tell")
    return partition
