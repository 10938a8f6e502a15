"""Files of a run that somebody changed: a refusal of ours, or what they say; nothing else, and little memory."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz import changed, fuzzed, json_values, little_memory
from hypothesis import given
from hypothesis import strategies as st

from fedfactory_ray.data.partition import Partition, partition_summary
from fedfactory_ray.data.partition_files import read_partition, save_partition
from fedfactory_ray.errors import CardError, FedFactoryError, StorageError
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import INDICES, MANIFEST, PARTITION
from fedfactory_ray.synthesis.plan import Unit
from fedfactory_ray.synthesis.shard import Shard, read_manifest, read_shard, write_shard

DEALT = Partition(3, {"a": {0: np.arange(40), 2: np.arange(50, 60)}, "b": {1: np.arange(100, 125)}})
UNIT = Unit("a", 0, 0, 5, 7, "0" * 64)
LINE = dict(vars(Shard(UNIT.file, "a", 0, 0, 5, "0" * 64, "1" * 64)))


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return Storage(str(tmp_path_factory.mktemp("run")))


def whole(name: str) -> bytes:
    """A file as it was written."""
    with tempfile.TemporaryDirectory() as made:
        run = Storage(made)
        save_partition(run, DEALT)
        write_shard(run, UNIT, np.arange(5 * 64, dtype=np.int64).astype(np.uint8).reshape(5, 8, 8, 1), "f" * 64, "ab")
        return run.read(name)


SUMMARY, WHOLE = partition_summary(DEALT), whole(INDICES)


def put(storage: Storage, name: str, content: Any) -> None:
    """Write a file without the care that a run takes: nothing is synced."""
    path = Path(storage.root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def test_what_was_written_is_read(storage: Storage) -> None:
    save_partition(storage, DEALT)
    found = read_partition(storage)
    assert found.sha256 == DEALT.sha256
    assert found.clients == DEALT.clients
    put(storage, MANIFEST, [LINE])
    assert [vars(shard) for shard in read_manifest(storage)] == [LINE]


def partition_or_refusal(storage: Storage) -> None:
    try:
        with little_memory():
            found = read_partition(storage)
    except StorageError as error:
        assert "partition." in str(error)
        assert len(str(error)) < 1000
        return
    assert found.sha256 == DEALT.sha256, "the digest is of the indices, so nothing else agrees with it"


@fuzzed(100)
@given(st.dictionaries(st.sampled_from(["sha256", "clients", "counts", "more"]), json_values, min_size=1))
def test_counts_of_any_values_are_refused(storage: Storage, changes: dict[str, Any]) -> None:
    put(storage, INDICES, WHOLE)
    put(storage, PARTITION, SUMMARY | changes)
    partition_or_refusal(storage)


@fuzzed(100)
@given(st.binary(max_size=200) | json_values | changed(json.dumps(SUMMARY).encode()))
def test_counts_of_any_bytes_are_refused(storage: Storage, content: Any) -> None:
    put(storage, INDICES, WHOLE)
    put(storage, PARTITION, content)
    partition_or_refusal(storage)


@fuzzed(150)
@given(changed(WHOLE) | st.binary(max_size=200))
def test_indices_of_any_bytes_are_refused(storage: Storage, content: bytes) -> None:
    put(storage, PARTITION, SUMMARY)
    put(storage, INDICES, content)
    partition_or_refusal(storage)


clients = st.none() | st.sampled_from(["a", "b", "", "../x"])
labels, indices = st.none() | st.integers(-2, 4), st.none() | st.integers(-3, 2**62)


@fuzzed(100)
@given(st.lists(st.tuples(clients, labels, indices), max_size=6), st.booleans())
def test_indices_of_any_rows_are_refused(storage: Storage, rows: list[Any], small: bool) -> None:
    columns = list(zip(*rows, strict=True)) if rows else [(), (), ()]
    kinds = (pa.string(), pa.int32() if small else pa.int64(), pa.int64())
    arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
    pq.write_table(pa.table(dict(zip(("client", "label", "index"), arrays, strict=True))), storage.path(INDICES))
    counts = [[sum(row[:2] == (c, y) for row in rows) for y in range(3)] for c in ("a", "b")]
    put(storage, PARTITION, SUMMARY | {"counts": counts})
    partition_or_refusal(storage)


def test_indices_of_more_rows_than_their_counts_are_not_read(storage: Storage) -> None:
    """Ten million equal rows are some bytes of a file."""
    n = 10_000_000
    columns = {"client": pa.array(["a"] * 1), "label": pa.array([0], pa.int32()), "index": pa.array([0], pa.int64())}
    row = pa.table(columns)
    with pq.ParquetWriter(storage.path(INDICES), row.schema) as writer:
        writer.write_table(pa.concat_tables([row] * 100).combine_chunks().take(pa.array(np.zeros(n, np.int64))))
    put(storage, PARTITION, SUMMARY)
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(StorageError, match=f"{n} rows"):
        read_partition(storage)
    assert pa.default_memory_pool().max_memory() == before


def manifest_or_refusal(storage: Storage) -> None:
    try:
        with little_memory():
            found = read_manifest(storage)
    except (StorageError, CardError) as error:
        assert len(str(error)) < 1000
        return
    assert all(shard.file.startswith("synthetic/class-") and ".." not in shard.file for shard in found)
    assert all(shard.n >= 0 for shard in found)


@fuzzed(200)
@given(st.dictionaries(st.sampled_from([*LINE, "more"]), json_values, min_size=1, max_size=3))
def test_a_manifest_of_any_values_is_read_or_refused(storage: Storage, changes: dict[str, Any]) -> None:
    put(storage, MANIFEST, [LINE, LINE | changes])
    manifest_or_refusal(storage)


@fuzzed(200)
@given(st.binary(max_size=200) | json_values | changed(json.dumps([LINE]).encode()))
def test_a_manifest_of_any_bytes_is_read_or_refused(storage: Storage, content: Any) -> None:
    put(storage, MANIFEST, content)
    manifest_or_refusal(storage)


@fuzzed(150)
@given(changed(whole(UNIT.file)))
def test_a_unit_of_any_bytes_is_whole_or_torn(storage: Storage, content: bytes) -> None:
    put(storage, UNIT.file, content)
    with little_memory():
        found = read_shard(storage, UNIT.file)
    assert found is None or (found.file, found.n) == (UNIT.file, 5)


@pytest.mark.parametrize("name", [PARTITION, MANIFEST])
def test_a_deep_or_large_file_is_refused(storage: Storage, name: str) -> None:
    save_partition(storage, DEALT)
    read = read_partition if name == PARTITION else read_manifest
    for content in (b"[" * 100_000, b"9" * 5000, b"\xff\xfe", b""):
        put(storage, name, content)
        with pytest.raises(FedFactoryError):
            read(storage)
    with open(storage.path(name), "wb") as file:
        file.truncate(2**29)
    with little_memory(), pytest.raises(StorageError, match="at most"):
        read(storage)
