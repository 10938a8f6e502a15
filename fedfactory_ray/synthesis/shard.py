"""A shard: the Parquet file of one unit; rows are images with label and provenance."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, TypeAdapter, ValidationError

from fedfactory_ray.errors import CardError, StorageError
from fedfactory_ray.generation.card import Whole
from fedfactory_ray.settings.data import NAME
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import MANIFEST, unit_file
from fedfactory_ray.synthesis.plan import Unit

ROWS_DIGEST, SHAPE = b"fedfactory.rows_sha256", b"fedfactory.shape"
MADE_OF, MADE_BY = b"fedfactory.fingerprint", b"fedfactory.canary"
"""Keys of a file's metadata."""
LARGEST = 2**28
"""Bytes of a manifest, at most."""
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Shard:
    """What a unit's file holds: a line of the manifest. A file is its own card (see `storage.artefact.Kept`).

    `canary` is that of the process that drew it (see generation.canary); empty where an earlier version did.
    """

    kind: ClassVar[str] = "unit"
    file: str
    client: Annotated[str, Field(pattern=NAME)]
    label: Whole
    unit: Whole
    n: Whole
    module_sha256: Digest
    rows_sha256: Digest
    fingerprint: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    canary: Annotated[str, Field(pattern=r"^[0-9a-f+]{0,8192}$")] = ""

    @classmethod
    def from_tree(cls, line: Any) -> Shard:
        """A line of a manifest as JSON values. Raises CardError for what is none, or has facts unknown here."""
        if not isinstance(line, dict):
            raise CardError(cls.kind, f"a {type(line).__name__}")
        unknown = line.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise CardError(cls.kind, ", ".join(sorted(unknown))[:300], newer=True)
        try:
            shard = _adapter().validate_python(line)
        except ValidationError as error:
            problem = error.errors()[0]
            raise CardError(cls.kind, f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error
        if shard.file != unit_file(shard.client, shard.label, shard.unit):
            raise CardError(cls.kind, f"the file {shard.file!r:.200}")
        return shard

    @staticmethod
    def mark(place: str) -> str:
        """See Kept."""
        return place

    @classmethod
    def read(cls, storage: Storage, place: str) -> Shard:
        """See Kept: by its rows, all of which are decoded."""
        found = read_shard(storage, place)
        if found is None:
            raise CardError(cls.kind, f"{place}, torn")
        return found

    def whole(self, storage: Storage, place: str) -> bool:
        """See Kept: `read` has compared the rows with their digest."""
        return True


@cache
def _adapter() -> TypeAdapter[Shard]:
    return TypeAdapter(Shard)


def read_manifest(storage: Storage) -> list[Shard]:
    """The lines of a run's manifest. Raises StorageError where it is none, CardError for a line that is none."""
    if storage.size(MANIFEST) > LARGEST:
        raise StorageError(f"{storage.uri}/{MANIFEST}", f"{storage.size(MANIFEST)} bytes", f"at most {LARGEST}")
    lines = storage.read_json(MANIFEST)
    if not isinstance(lines, list):
        raise StorageError(f"{storage.uri}/{MANIFEST}", f"a {type(lines).__name__}", "a list of units")
    return [Shard.from_tree(line) for line in lines]


def shard_of(unit: Unit, images: np.ndarray, fingerprint: str = "", canary: str = "") -> Shard:
    """The manifest's line of a unit whose images are uint8 (n, H, W, C)."""
    digest = rows_digest(unit, images)
    place = (unit.file, unit.client, unit.label, unit.index)
    return Shard(*place, unit.n, unit.module_sha256, digest, fingerprint, canary)


def manifest_digest(manifest: list[Shard]) -> str:
    """SHA-256 of all rows, in order."""
    return hashlib.sha256("".join(shard.rows_sha256 for shard in manifest).encode()).hexdigest()


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


def write_shard(storage: Storage, unit: Unit, images: np.ndarray, fingerprint: str = "", canary: str = "") -> Shard:
    """Write a unit's file atomically; `fingerprint` is what determined its images, `canary` that of the process."""
    table, shard = to_table(unit, images), shard_of(unit, images, fingerprint, canary)
    with storage.writing(unit.file) as stream:
        facts = table.schema.metadata | {MADE_OF: fingerprint.encode(), MADE_BY: canary.encode()}
        pq.write_table(table.replace_schema_metadata(facts), stream, compression="zstd")
    return shard


def read_shard(storage: Storage, file: str) -> Shard | None:
    """What a unit's file holds, by its rows, or None where it is missing, torn, or not what its digest says."""
    if not storage.exists(file):
        return None
    try:
        table = pq.read_table(storage.path(file), filesystem=storage.filesystem)
        facts = table.schema.metadata
        height, width, channels = json.loads(facts[SHAPE])
        images = images_of(table, (height, width, channels))
        label, client, module, index = (table[name][0].as_py() for name in ("label", "client", "module", "unit"))
        unit = Unit(client, label, index, table.num_rows, 0, module)
        expected = to_table(unit, images)
        same = expected.equals(table) and expected.schema.metadata.items() <= facts.items()
        fingerprint, canary = (facts.get(key, b"").decode() for key in (MADE_OF, MADE_BY))
        return shard_of(unit, images, fingerprint, canary) if same and unit.file == file else None
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError, AttributeError):  # each a way of being torn
        return None


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
