"""The data sources: scikit-learn's digits, .npz files, MedMNIST, CIFAR-10."""

from __future__ import annotations

import hashlib
import io
import lzma
import math
import struct
import time
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import IO

import numpy as np

from fedfactory_ray.data.image_folder import ImageFolder
from fedfactory_ray.data.source import Source, Split
from fedfactory_ray.data.transforms import resize_batch
from fedfactory_ray.errors import DataInvalidError, DataMissingError
from fedfactory_ray.seeds import random_state
from fedfactory_ray.settings.data import DataConfig
from fedfactory_ray.settings.medmnist import medmnist_info

CHUNK_BYTES = 2**24
MOST_ROWS, MOST_CLASSES, MOST_PIXELS = 2**27, 2**16, 2**26
"""Of an .npz file: rows of an array, classes that labels tell of, pixels of an image."""
DAMAGES = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError, SyntaxError),
    *(ValueError, TypeError, LookupError, ArithmeticError, OSError, EOFError, NotImplementedError, RuntimeError),
)
"""What damaged .npz files make Python and NumPy raise."""
NAMED = "train_images, train_labels, test_images and test_labels: np.savez(file, train_images=x_train, …)"


def open_source(config: DataConfig) -> Source:
    """The source that `config` names, its classes numbered by `config.class_names` where these are known.

    Raises DataMissingError or DataInvalidError.
    """
    source, names = _open(config), config.class_names
    if names is not None and list(names) != source.class_names:
        found = f"data.class_names {', '.join(names)}"
        raise DataInvalidError(source.path, found, f"its own, {source.class_names}: leave data.class_names out")
    return source


def _open(config: DataConfig) -> Source:
    if config.source == "digits":
        return Digits(config)
    if config.source == "cifar10":
        return Cifar10(config)
    if config.source.startswith("medmnist:"):
        return ArrayFile(_medmnist_file(config), config.resolution, _medmnist_class_names(config))
    if "://" in config.source:
        raise DataInvalidError(config.source, "an address", "the path of a file or folder that every node can read")
    path = Path(config.source).expanduser()
    if not path.exists():
        raise DataMissingError(path.absolute(), None, f"data.source={config.source}")
    names = None if config.class_names is None else list(config.class_names)
    if not path.is_dir() and not path.is_file():
        raise DataInvalidError(path.absolute(), "a pipe, socket or device", "an .npz file, or a folder of images")
    if path.is_dir():
        return ImageFolder(path, config.resolution, names, config.background)
    if not zipfile.is_zipfile(path) and path.suffix != ".npz":
        raise DataInvalidError(path, f"a {path.suffix or 'nameless'} file", "an .npz in MedMNIST's layout, or a folder")
    return ArrayFile(path, config.resolution, names)


def is_here(config: DataConfig) -> bool:
    """Whether this machine has the files of the source that `config` names. Opens none of them."""
    name, root = config.source, Path(config.root).expanduser()
    if name == "digits":
        return True
    if name == "cifar10":
        return (root / "cifar-10-batches-py").is_dir()
    if name.startswith("medmnist:"):
        return (root / _medmnist_name(config)).is_file()
    return Path(name).expanduser().exists()


def _medmnist_name(config: DataConfig) -> str:
    return f"{config.source.partition(':')[2]}{'' if config.size == 28 else f'_{config.size}'}.npz"


class Digits:
    """scikit-learn's 1797 handwritten digits, 8×8 grey; 60 % train, 10 % val and 30 % test of each class."""

    path = "scikit-learn's digits"
    skipped: Mapping[str, int] = MappingProxyType({})

    def __init__(self, config: DataConfig) -> None:
        self.resolution = config.resolution
        self.class_names = [str(digit) for digit in range(10)]

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        # The file itself: scikit-learn takes two seconds to import, in every process that reads digits.
        library = find_spec("sklearn")
        assert library is not None and library.origin is not None
        rows = np.loadtxt(Path(library.origin).with_name("datasets") / "data" / "digits.csv.gz", delimiter=",")
        images, labels = rows[:, :-1], rows[:, -1]
        return (images * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8, 1), labels.astype(np.int64)

    @cached_property
    def _splits(self) -> dict[Split, np.ndarray]:
        labels, parts = self._arrays[1], {"train": [], "val": [], "test": []}  # type: ignore[var-annotated]
        for y in range(10):
            order = random_state("digits", y).permutation(np.flatnonzero(labels == y))
            edges = [round(0.6 * len(order)), round(0.7 * len(order))]
            for part, indices in zip(parts.values(), np.split(order, edges), strict=True):
                part.append(indices)
        return {
            "train": np.sort(np.concatenate(parts["train"])),
            "val": np.sort(np.concatenate(parts["val"])),
            "test": np.sort(np.concatenate(parts["test"])),
        }

    def labels(self, split: Split) -> np.ndarray:
        """See Source."""
        return self._arrays[1][self._splits[split]]

    def images(self, split: Split, indices: np.ndarray | None = None) -> np.ndarray:
        """See Source."""
        chosen = self._splits[split] if indices is None else self._splits[split][indices]
        return resize_batch(self._arrays[0][chosen], self.resolution)

    def image_shape(self) -> tuple[int, int, int]:
        """See Source."""
        return (self.resolution or 8, self.resolution or 8, 1)


class ArrayFile:
    """An .npz file in MedMNIST's layout: {train,val,test}_images uint8 (n, H, W[, C]) and _labels (n[, 1])."""

    skipped: Mapping[str, int] = MappingProxyType({})

    def __init__(self, path: Path, resolution: int | None, class_names: list[str] | None = None) -> None:
        self.path, self.resolution = str(path), resolution
        if class_names is None:
            splits: tuple[Split, ...] = ("train", "test")
            labels = next((found for split in splits if (found := self.labels(split)).size), np.empty(0))
            most = int(labels.max(initial=-1))
            if most >= MOST_CLASSES:
                needed = f"labels from 0 to {MOST_CLASSES - 1} at most, numbered without gaps"
                raise DataInvalidError(self.path, f"the label {most}", needed)
            class_names = [str(y) for y in range(most + 1)]
        self.class_names = class_names

    @contextmanager
    def _open(self, key: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
        """The stream of one array's values, its shape and dtype; a missing split is an empty array."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                there = {name.removesuffix(".npy") for name in archive.namelist()}
                if key not in there:
                    split = key.partition("_")[0]
                    if not any(name.endswith(("_images", "_labels")) for name in there):
                        raise DataInvalidError(self.path, f"arrays {', '.join(sorted(there))}", NAMED)
                    if not there & {f"{split}_images", f"{split}_labels"}:
                        yield io.BytesIO(), (0,), np.dtype(np.uint8)
                        return
                    raise DataInvalidError(self.path, f"no array {key!r}", f"{split}_images and {split}_labels")
                with archive.open(f"{key}.npy") as member:
                    version = np.lib.format.read_magic(member)
                    read = np.lib.format.read_array_header_1_0
                    shape, fortran, dtype = (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(member)
                    if fortran and len(shape) > 1:
                        needed = f"C order: np.ascontiguousarray({key}) before it is saved"
                        raise DataInvalidError(self.path, f"{key} in Fortran order", needed)
                    if dtype.hasobject or not shape:
                        raise DataInvalidError(self.path, f"{key} as {dtype} {shape}"[:300], "numbers, a row an image")
                    self._refuse_false(key, shape, dtype, archive.getinfo(f"{key}.npy").file_size - member.tell())
                    yield member, shape, dtype
        except DAMAGES as error:
            raise DataInvalidError(self.path, f"a corrupt file ({key}: {error})", "an intact .npz file") from error

    def _refuse_false(self, key: str, shape: tuple[int, ...], dtype: np.dtype, there: int) -> None:
        """Raise DataInvalidError for a header that tells of more than lies there, or of more than anybody has."""
        told = f"{key} as {dtype} {shape}"[:300]
        if not 0 <= shape[0] <= MOST_ROWS or (shape[0] and not 1 <= math.prod(shape[1:]) <= 3 * MOST_PIXELS):
            needed = f"at most {MOST_ROWS} rows, of images of 1 to {MOST_PIXELS} pixels"
            raise DataInvalidError(self.path, told, needed)
        if math.prod(shape) * dtype.itemsize != there:
            raise DataInvalidError(self.path, f"{told}, but {there} bytes of it", "an intact .npz file")

    def _read(self, key: str, indices: np.ndarray | None = None) -> np.ndarray:
        """Rows of one array; only those at `indices` are kept while the file is decompressed."""
        with self._open(key) as (member, shape, dtype):
            row_bytes = int(np.prod(shape[1:])) * dtype.itemsize
            if indices is None:
                indices = np.arange(shape[0])
            if indices.size and not 0 <= indices.min() <= indices.max() < shape[0]:
                found = f"{shape[0]} rows of {key}, asked for rows {indices.min()} to {indices.max()}"
                raise DataInvalidError(self.path, found, "a row for every label")
            rows = np.empty((len(indices), *shape[1:]), dtype)
            wanted = np.argsort(indices, kind="stable")
            position = 0
            chunk_rows = max(1, CHUNK_BYTES // max(row_bytes, 1))
            for start in range(0, shape[0], chunk_rows):
                n = min(chunk_rows, shape[0] - start)
                chunk = np.frombuffer(member.read(n * row_bytes), dtype).reshape(n, *shape[1:])
                end = np.searchsorted(indices[wanted], start + n)
                here = wanted[position:end]
                rows[here] = chunk[indices[here] - start]
                position = int(end)
            return rows

    def labels(self, split: Split) -> np.ndarray:
        """See Source."""
        found = self._read(f"{split}_labels")
        if found.ndim > 2 or (found.ndim == 2 and found.shape[1] != 1) or (found.size and found.dtype.kind not in "iu"):
            raise DataInvalidError(self.path, f"{split}_labels {found.dtype} {found.shape}", "one integer an image")
        if found.size and int(found.max()) > np.iinfo(np.int32).max:
            wrapped = found.dtype.kind == "u" and found.max() == np.iinfo(found.dtype).max
            told = f"the {split} label {found.max()}" + f", perhaps -1 as {found.dtype}" * bool(wrapped)
            raise DataInvalidError(self.path, told, "labels from 0 on, one a class")
        return found.reshape(-1).astype(np.int64)

    def images(self, split: Split, indices: np.ndarray | None = None) -> np.ndarray:
        """See Source."""
        images = self._read(f"{split}_images", indices)
        if not images.size:
            return np.empty((0, *self.image_shape()), np.uint8)
        return resize_batch(images if images.ndim == 4 else images[..., None], self.resolution)

    def try_images(self, split: Split, until: float) -> int:
        """Decompress a split's images, which checks their CRC, keeping none, until `time.monotonic()` is `until`.

        Returns how many had no turn. Raises DataInvalidError.
        """
        with self._open(f"{split}_images") as (member, shape, _):
            read = 0
            while chunk := member.read(CHUNK_BYTES):
                read += len(chunk)
                if time.monotonic() >= until:
                    return max(0, shape[0] - read // max(1, math.prod(shape[1:])))
        return 0

    def image_shape(self) -> tuple[int, int, int]:
        """See Source."""
        shapes = set()
        splits: tuple[Split, ...] = ("train", "val", "test")
        for split in splits:
            n = len(self.labels(split))
            with self._open(f"{split}_images") as (_, shape, dtype):
                if shape[0] != n:
                    found = f"{split}_images with {shape[0]} rows, {split}_labels with {n}"
                    raise DataInvalidError(self.path, found, "a label for every image")
                if n and (dtype != np.uint8 or len(shape) not in (3, 4)):
                    found = f"{split}_images {dtype} {shape}"
                    raise DataInvalidError(self.path, found, "uint8 (n, H, W[, C])")
                if n:
                    shapes.add((*shape[1:3], shape[3] if len(shape) == 4 else 1))
        alike = {channels for _, _, channels in shapes} if self.resolution else shapes
        if len(alike) != 1:
            needed = "one shape in all splits, or data.resolution to resize them; grey or RGB in all"
            raise DataInvalidError(self.path, f"images of mixed shapes {sorted(shapes)}", needed)
        height, width, channels = shapes.pop()
        return (self.resolution or height, self.resolution or width, channels)


class Cifar10:
    """CIFAR-10 (Krizhevsky 2009) through torchvision, which checks the files' MD5; it has no val split."""

    class_names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]  # noqa: RUF012
    skipped: Mapping[str, int] = MappingProxyType({})

    def __init__(self, config: DataConfig) -> None:
        from torchvision.datasets import CIFAR10

        self.resolution, root = config.resolution, Path(config.root).expanduser()
        self.path = str(root / CIFAR10.filename)
        self._sets = {}
        for split in ("train", "test"):
            try:
                self._sets[split] = CIFAR10(root, train=split == "train", download=config.download)
            except (OSError, RuntimeError) as error:
                raise DataMissingError(self.path, CIFAR10.tgz_md5, CIFAR10.url) from error

    def labels(self, split: Split) -> np.ndarray:
        """See Source."""
        return np.asarray(self._sets[split].targets if split in self._sets else [], dtype=np.int64)

    def images(self, split: Split, indices: np.ndarray | None = None) -> np.ndarray:
        """See Source."""
        if split not in self._sets:
            return np.empty((0, *self.image_shape()), np.uint8)
        images = self._sets[split].data
        return resize_batch(images if indices is None else images[indices], self.resolution)

    def image_shape(self) -> tuple[int, int, int]:
        """See Source."""
        return (self.resolution or 32, self.resolution or 32, 3)


def _medmnist_class_names(config: DataConfig) -> list[str]:
    names = medmnist_info()[config.source.partition(":")[2]]["label"]
    return [names[str(y)] for y in range(len(names))]


def _medmnist_file(config: DataConfig) -> Path:
    """The verified file of a MedMNIST set, downloaded where allowed and possible."""
    flag = config.source.partition(":")[2]
    suffix = "" if config.size == 28 else f"_{config.size}"
    info, path = medmnist_info()[flag], Path(config.root).expanduser() / _medmnist_name(config)
    url, checksum = info[f"url{suffix}"], info[f"MD5{suffix}"]
    if config.download and not path.exists():
        from torchvision.datasets.utils import download_url

        try:
            download_url(url, str(path.parent), path.name, checksum)
        except (OSError, RuntimeError) as error:
            raise DataMissingError(path, checksum, url) from error
    if not path.exists():
        raise DataMissingError(path, checksum, url)
    with path.open("rb") as content:
        found = hashlib.file_digest(content, "md5").hexdigest()
    if found != checksum:
        raise DataInvalidError(path, "another MD5 than MedMNIST's", f"{checksum}; delete the file to download it again")
    return path
