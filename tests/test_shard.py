from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfactory_ray.storage.files import Storage
from fedfactory_ray.synthesis.plan import Unit
from fedfactory_ray.synthesis.shard import ROWS_DIGEST, images_of, read_shard, rows_digest, to_table, write_shard

UNIT = Unit("client-002", 4, 1, 12, 99, "f00d" * 16)


def images_for(unit: Unit = UNIT, side: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (unit.n, side, side, channels)).astype(np.uint8)


def verified_digest(storage: Storage, unit: Unit) -> str | None:
    """Digest of the rows of a unit's file, or None where it is missing, torn, or not of this unit."""
    found = read_shard(storage, unit.file)
    if found is None or (found.n, found.module_sha256) != (unit.n, unit.module_sha256):
        return None
    return found.rows_sha256


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


def written(storage: Storage) -> Path:
    write_shard(storage, UNIT, images_for())
    return Path(storage.path(UNIT.file))


# Round trip


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 12), st.sampled_from([1, 3]), st.integers(0, 1000))
def test_tables_give_the_images_back(n: int, side: int, channels: int, seed: int) -> None:
    images = np.random.RandomState(seed).randint(0, 256, (n, side, side + 1, channels)).astype(np.uint8)
    assert np.array_equal(images_of(to_table(replace(UNIT, n=n), images), images.shape[1:]), images)


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (28, 3), (1, 1)])
def test_a_shard_round_trips_through_storage(storage: Storage, side: int, channels: int) -> None:
    images = images_for(side=side, channels=channels)
    digest = write_shard(storage, UNIT, images).rows_sha256
    assert storage.names("synthetic") == [UNIT.file]
    assert verified_digest(storage, UNIT) == digest == rows_digest(UNIT, images)
    table = pq.read_table(storage.path(UNIT.file))
    assert np.array_equal(images_of(table, images.shape[1:]), images)
    assert table.column("label").to_pylist() == [4] * 12
    assert table.column("client").to_pylist() == ["client-002"] * 12
    assert table.column("module").to_pylist() == ["f00d" * 16] * 12
    assert table.column("unit").to_pylist() == [1] * 12
    assert table.column("index").to_pylist() == list(range(12))


def test_strided_images_are_stored_as_they_look(storage: Storage) -> None:
    images = images_for().transpose(0, 2, 1, 3)[:, ::-1]
    digest = write_shard(storage, UNIT, images).rows_sha256
    assert np.array_equal(images_of(pq.read_table(storage.path(UNIT.file)), images.shape[1:]), images)
    assert verified_digest(storage, UNIT) == digest == rows_digest(UNIT, images.copy())


def test_writing_again_gives_the_same_bytes(storage: Storage) -> None:
    first = written(storage).read_bytes()
    assert written(storage).read_bytes() == first


# The digest


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 12 * 8 * 8 * 3 - 1), st.integers(1, 255))
def test_the_digest_changes_with_any_pixel(place: int, change: int) -> None:
    images = images_for()
    before = rows_digest(UNIT, images)
    images.ravel()[place] ^= change
    assert rows_digest(UNIT, images) != before


@pytest.mark.parametrize(
    "change", [{"client": "client-003"}, {"label": 5}, {"index": 2}, {"module_sha256": "beef" * 16}]
)
def test_the_digest_changes_with_provenance(change: dict[str, object]) -> None:
    other = replace(UNIT, **change)  # type: ignore[arg-type]
    assert rows_digest(other, images_for()) != rows_digest(UNIT, images_for())


def test_the_digest_changes_with_order_and_shape() -> None:
    images = images_for()
    assert rows_digest(UNIT, images[::-1]) != rows_digest(UNIT, images)
    assert rows_digest(UNIT, images.reshape(12, 4, 16, 3)) != rows_digest(UNIT, images)


# Verification


def test_a_missing_file_is_not_verified(storage: Storage) -> None:
    assert verified_digest(storage, UNIT) is None


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_is_not_verified(storage: Storage, kept: float) -> None:
    file = written(storage)
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    assert verified_digest(storage, UNIT) is None


def test_files_that_are_no_parquet_are_not_verified(storage: Storage) -> None:
    file = written(storage)
    for content in (b"PAR1", b"PAR1PAR1", b"<html></html>" * 50, b"PAR1" + bytes(500) + b"PAR1"):
        file.write_bytes(content)
        assert verified_digest(storage, UNIT) is None


def test_damaged_files_are_not_verified_or_hold_the_same_rows(storage: Storage) -> None:
    file = written(storage)
    content, intact, images = file.read_bytes(), verified_digest(storage, UNIT), images_for()
    refused, wrong, crashed = 0, [], []
    for place in range(0, len(content), len(content) // 300):
        spoilt = bytearray(content)
        spoilt[place] ^= 0x55
        file.write_bytes(spoilt)
        try:
            digest = verified_digest(storage, UNIT)
        except Exception as error:  # noqa: BLE001
            crashed.append((place, repr(error)[:90]))
            continue
        refused += digest is None
        if digest is not None and not (
            digest == intact
            and np.array_equal(images_of(pq.read_table(file, columns=["image"]), images.shape[1:]), images)
        ):
            wrong.append(place)
    assert refused > 100
    assert not wrong
    assert not crashed, f"{len(crashed)} damages ended otherwise: {crashed[:5]}"


@pytest.mark.parametrize(
    "change",
    [{"client": "client-003"}, {"label": 5}, {"index": 2}, {"module_sha256": "beef" * 16}, {"n": 11}, {"n": 13}],
)
def test_the_file_of_another_unit_is_not_verified(storage: Storage, change: dict[str, object]) -> None:
    file = written(storage)
    other = replace(UNIT, **change)  # type: ignore[arg-type]
    target = Path(storage.path(other.file))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(file.read_bytes())
    assert verified_digest(storage, other) is None
    assert verified_digest(storage, UNIT) is not None


def rewrite(file: Path, name: str, column: pa.Array) -> None:
    """The file with another column, all else and the digest in its metadata as they were."""
    table = pq.read_table(file)
    changed = table.set_column(table.schema.get_field_index(name), name, column)
    pq.write_table(changed.replace_schema_metadata({ROWS_DIGEST: table.schema.metadata[ROWS_DIGEST]}), file)


def test_altered_pixels_are_not_verified(storage: Storage) -> None:
    file = written(storage)
    images = images_for()
    images[3, 2, 1, 0] ^= 1
    rewrite(file, "image", to_table(UNIT, images).column("image").combine_chunks())
    assert verified_digest(storage, UNIT) is None


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("label", pa.array([4] * 11 + [5])),
        ("client", pa.array(["client-003"] * 12)),
        ("module", pa.array(["beef"] * 12)),
        ("unit", pa.array([2] * 12)),
        ("index", pa.array(list(range(12))[::-1])),
    ],
)
def test_altered_columns_are_not_verified(storage: Storage, name: str, column: pa.Array) -> None:
    file = written(storage)
    rewrite(file, name, column)
    assert verified_digest(storage, UNIT) is None


@pytest.mark.parametrize("name", ["image", "label", "index"])
def test_a_file_that_lacks_a_column_is_not_verified(storage: Storage, name: str) -> None:
    file = written(storage)
    pq.write_table(pq.read_table(file).drop_columns([name]), file)
    assert verified_digest(storage, UNIT) is None


def test_images_of_another_type_are_not_verified(storage: Storage) -> None:
    file = written(storage)
    rewrite(file, "image", pa.array([row.tolist() for row in images_for().reshape(12, -1)]))
    assert verified_digest(storage, UNIT) is None


def test_a_file_without_a_digest_is_not_verified(storage: Storage) -> None:
    file = written(storage)
    pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
    assert verified_digest(storage, UNIT) is None


# Other readers, in one line each


def test_pyarrow_reads_a_shard(storage: Storage) -> None:
    file = written(storage)
    images = pq.read_table(file)["image"].combine_chunks().flatten().to_numpy().reshape(-1, *images_for().shape[1:])
    assert images.dtype == np.uint8
    assert np.array_equal(images, images_for())


def test_pyarrow_reads_a_folder_of_shards(storage: Storage) -> None:
    file, second = written(storage), replace(UNIT, index=2)
    write_shard(storage, second, images_for(seed=1))
    images = (
        pq.read_table(file.parent)["image"].combine_chunks().flatten().to_numpy().reshape(-1, *images_for().shape[1:])
    )
    assert np.array_equal(images, np.concatenate([images_for(), images_for(seed=1)]))


def test_pandas_reads_a_shard(storage: Storage) -> None:
    import pandas as pd

    frame = pd.read_parquet(written(storage))
    assert list(frame.columns) == ["image", "label", "client", "module", "unit", "index"]
    assert frame["label"].tolist() == [4] * 12
    flat = np.stack(frame["image"].to_list())
    assert flat.dtype == np.uint8
    assert np.array_equal(flat.reshape(images_for().shape), images_for())


@pytest.fixture
def hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("datasets")


def test_hugging_face_datasets_loads_a_shard(storage: Storage, tmp_path: Path, hugging_face: Any) -> None:
    file = written(storage)
    rows = hugging_face.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["label"][:] == [4] * 12
    images = np.array(rows.with_format("numpy")["image"][:], np.uint8)
    assert np.array_equal(images.reshape(images_for().shape), images_for())


def test_hugging_face_datasets_takes_a_shard_from_pandas(storage: Storage, hugging_face: Any) -> None:
    import pandas as pd

    rows = hugging_face.Dataset.from_pandas(pd.read_parquet(written(storage)))
    assert rows["label"][:] == [4] * 12
    images = np.array(rows.with_format("numpy")["image"][:], np.uint8)
    assert np.array_equal(images.reshape(images_for().shape), images_for())
