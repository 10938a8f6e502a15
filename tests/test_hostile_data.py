"""Data and settings from strangers: refused in seconds, by file, before anything large is read; never a traceback."""

from __future__ import annotations

import io
import os
import struct
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_npz
from fuzz import changed, fuzzed, little_memory
from hypothesis import given
from PIL import Image

from fedfactory_ray.data.readers import open_source
from fedfactory_ray.data.source import inspect
from fedfactory_ray.errors import ConfigError, DataInvalidError, FedFactoryError
from fedfactory_ray.pipeline.survey import check_files
from fedfactory_ray.settings.command_line import make_config
from fedfactory_ray.settings.data import DataConfig
from fedfactory_ray.tracking import plots


def read(path: Path) -> None:
    """What a run does with a source before it starts, and all images once."""
    source = open_source(DataConfig(source=str(path)))
    inspect(source)
    check_files(source)
    source.images("train")


def folder(path: Path) -> Path:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (path / split / name).mkdir(parents=True)
            for k in range(2):
                Image.fromarray(np.full((8, 8), 40 * k, np.uint8)).save(path / split / name / f"{k}.png")
    return path


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header tells of so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def in_folder(change: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        change(folder(path / "pictures"))
        return path / "pictures"

    return make


def dog(content: bytes) -> Callable[[Path], Path]:
    return in_folder(lambda path: (path / "train/dog/1.png").write_bytes(content))


def looped(path: Path) -> None:
    (path / "train/dog/again").symlink_to(path / "train/dog")


def array(**changes: np.ndarray) -> Callable[[Path], Path]:
    return lambda path: write_npz(path / "a.npz", **changes)


def header(key: str, shape: str, dtype: str = "|u1", data: bytes = b"\0" * 120) -> Callable[[Path], Path]:
    """A file in which the header of an array tells of `shape`, whatever lies behind it."""

    def make(path: Path) -> Path:
        whole = write_npz(path / "whole.npz")
        text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
        text += b" " * (64 - (len(text) + 11) % 64) + b"\n"
        with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path / "a.npz", "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                made = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data
                new.writestr(name, made if name == f"{key}.npy" else old.read(name))
        return path / "a.npz"

    return make


def raw(content: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        (path / "a.npz").write_bytes(content)
        return path / "a.npz"

    return make


def fifo(path: Path) -> Path:
    os.mkfifo(path / "a.npz")
    return path / "a.npz"


def labels(value: int, kind: type) -> np.ndarray:
    return np.append(np.arange(119) % 3, value).astype(kind)


HOSTILE: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "link to its own folder": ("leads back", in_folder(looped)),
    "link to a folder above": ("leads back", in_folder(lambda p: (p / "train/dog/up").symlink_to(p / "train"))),
    "link to the root": ("leads back", in_folder(lambda p: (p / "train/dog/up").symlink_to("/"))),
    "class that is the root": ("leads back|folders", in_folder(lambda p: (p / "train/up").symlink_to(p))),
    "link to itself": ("no readable file", in_folder(lambda p: (p / "train/dog/x.png").symlink_to("x.png"))),
    "link to nothing": ("no readable file", in_folder(lambda p: (p / "train/dog/x.png").symlink_to("y.png"))),
    "FIFO as an image": ("a pipe", in_folder(lambda p: os.mkfifo(p / "train/dog/x.png"))),
    "FIFO to test": ("a pipe", in_folder(lambda p: os.mkfifo(p / "test/dog/x.png"))),
    "device as an image": ("a pipe", in_folder(lambda p: (p / "train/dog/x.png").symlink_to("/dev/zero"))),
    "header of 20000 × 20000": ("readable image.*limit", dog(png_header(20_000, 20_000))),
    "header of 12000 × 12000": ("readable image.*limit", dog(png_header(12_000, 12_000))),
    "header of side 0": ("readable image|broken", dog(png_header(0, 8))),
    "header of 2^31": ("readable image", dog(png_header(2**31 - 1, 2**31 - 1))),
    "half an image": ("broken image", in_folder(lambda p: os.truncate(p / "train/dog/1.png", 45))),
    "empty image": ("readable image", dog(b"")),
    "class of two lines": ("class named", in_folder(lambda p: [(p / s / "a\nb").mkdir() for s in ("train", "test")])),
    "FIFO as a file": ("a pipe", fifo),
    "device as a file": ("a pipe", lambda path: Path("/dev/zero")),
    "label 10^9": ("the label 1000000000", array(train_labels=labels(10**9, np.int64))),
    "label 10^9 to test": ("labels from", array(test_labels=np.append(np.arange(59) % 3, 10**9))),
    "label 10^5": ("the label 100000", array(train_labels=labels(10**5, np.int64))),
    "label 2^62": ("label 4611686018427387904", array(train_labels=labels(2**62, np.int64))),
    "label -1": ("labels from -1", array(train_labels=labels(-1, np.int64))),
    "label 2**62": ("label 4611686018427387904\n", array(train_labels=labels(2**62, np.int64))),
    "label -1 as uint32": ("perhaps -1 as uint32", array(train_labels=labels(-1, np.int64).astype(np.uint32))),
    "label -1 as uint64": ("perhaps -1 as uint64", array(train_labels=labels(-1, np.int64).astype(np.uint64))),
    "label NaN": ("one integer an image", array(train_labels=np.full(120, np.nan))),
    "header of 10^10 labels": ("at most", header("train_labels", "(10000000000,)")),
    "header of 10^8 labels": ("but 120 bytes", header("train_labels", "(100000000,)")),
    "header of 10^10 images": ("at most", header("train_images", "(10000000000, 8, 8)")),
    "header of 2^64 pixels": ("at most", header("train_images", "(2, 4294967296, 4294967296)")),
    "header of side 10^5": ("at most", header("train_images", "(120, 100000, 100000)")),
    "header of height 0": ("1 to", header("train_images", "(120, 0, 8)", data=b"")),
    "header below 0": ("at most|corrupt", header("train_images", "(-1, 8, 8)")),
    "header of texts": ("corrupt|numbers", header("train_images", "('a', 8)")),
    "header of no type": ("corrupt", header("train_images", "(120,)", dtype="|what")),
    "header of objects": ("as object|numbers", header("train_labels", "(120,)", dtype="|O")),
    "header of code": ("corrupt", header("train_labels", "__import__('os').abort()")),
    "header deep": ("corrupt", header("train_labels", "(" * 300 + ")" * 300)),
    "images of 32 dimensions": ("uint8", header("train_images", f"(120{', 1' * 31})")),
    "images of floats": ("uint8", array(train_images=np.zeros((120, 8, 8)))),
    "more labels than images": ("a label for every image|labels with", array(train_labels=np.arange(150) % 3)),
    "empty file": ("corrupt", raw(b"")),
    "half a file": ("corrupt", raw(b"PK\x03\x04" + b"\0" * 40)),
    "no zip": ("corrupt", raw(b"\x93NUMPY\x01\x00" + b"\0" * 100)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_data_are_refused_by_file_and_little_is_read(what: str, tmp_path: Path) -> None:
    reason, make = HOSTILE[what]
    path = make(tmp_path)
    began = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(DataInvalidError, match=f"(?s)({reason})") as refusal:
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 300 * 2**20
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 20
    assert str(path)[:-1] in str(refusal.value)
    assert len(str(refusal.value)) < 2500


def test_links_to_other_folders_are_followed(tmp_path: Path) -> None:
    made = folder(tmp_path / "pictures")
    (made / "train/dog").rename(tmp_path / "dogs")
    (made / "train/dog").symlink_to(tmp_path / "dogs")
    info, found = inspect(open_source(DataConfig(source=str(made))))
    assert info.counts["train"] == [2, 2]
    assert len(found) == 4


WHOLE = io.BytesIO()
SMALL = {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.arange(4, dtype=np.uint8) % 2}
np.savez_compressed(WHOLE, **{f"{split}_{key}": array for split in ("train", "test") for key, array in SMALL.items()})


@fuzzed(200)
@given(changed(WHOLE.getvalue()))
def test_a_file_of_any_changed_bytes_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.npz"
    path.write_bytes(content)
    try:
        with little_memory():
            read(path)
    except FedFactoryError as error:
        assert "changed.npz" in str(error)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}, *a{k - 1}]\n" for k in range(1, 40))
YAMLS = {
    "bomb": (BOMB, "more than"),
    "circle": ("a: &a\n  b: *a\n", "deep"),
    "wide circle": ("a: &a [*a, *a]\n", "more than|deep"),
    "deep": ("[" * 100_000, "so deep"),
    "deep sections": ("".join(f"{' ' * k}a:\n" for k in range(50)), "deep"),
    "large": ("name: " + "x" * 2**21, "bytes"),
    "numeric key": ("1: 2\n", "the key 1"),
    "numeric key within": ("data: {7: digits}\n", "the key 7"),
    "key of a list": ("? [a]\n: b\n", "."),
    "no UTF-8": (b"\xff\xfe\xff", "."),
    "no date": ("name: 2020-13-45\n", "."),
    "code": ("!!python/object/apply:os.abort []\n", "."),
    "a list": ("- a\n", "found a list"),
    "a text": ("hello", "found a str"),
    "section twice": ("generator: {epochs: 3}\ngenerator: {batch_size: 4}\n", "found 'generator' twice"),
    "key twice": ("data: {source: a, source: b}\n", "found 'source' twice"),
    "truth for a seed": ("seed: true\n", "seed: needed no truth value"),
    "truth for a number": ("generator: {batch_size: true}\n", "batch_size: needed no truth value"),
    "many digits": ("seed: " + "9" * 5000, "."),
    "infinite": ("generator: {learning_rate: .inf}\n", "finite"),
    "NaN": ("generator: {noise_mean: .nan}\n", "finite"),
    "infinite resources": ("resources: {client: {num_cpus: .inf}}\n", "finite"),
    "infinite away": ("resources: {away_seconds: .inf}\n", "finite"),
    "NaN alpha": ("partition: {alpha: .nan}\n", "finite"),
    "excluded in Arabic digits": ("partition: {exclude: [client-000/٠]}\n", "exclude"),
    "excluded in two spellings": ("partition: {exclude: [client-000/00]}\n", "exclude"),
    "name upwards": ("name: ../../outside\n", "name"),
    "name long": (f"name: {'x' * 129}\n", "name"),
    "storage of NUL": ('storage: {uri: "a\\0b"}\n', "storage.uri"),
    "storage nowhere": ("storage: {uri: ' '}\n", "storage.uri"),
    "experiment upwards": ("tracking: {experiment: ../../outside}\n", "experiment"),
    "class of two lines": ('data: {class_names: [a, "b\\nc"]}\n', "printed"),
}


@pytest.mark.parametrize("what", YAMLS)
def test_settings_are_refused_by_file_in_no_time(what: str, tmp_path: Path) -> None:
    text, reason = YAMLS[what]
    file = tmp_path / "mine.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    began = time.process_time()
    with pytest.raises(ConfigError, match=reason) as refusal:
        make_config(file=str(file))
    assert time.process_time() - began < 20
    assert len(str(refusal.value)) < 3000


def test_a_pipe_of_settings_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mine.yaml")
    with pytest.raises(ConfigError, match="found no file"):
        make_config(file=str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("number", ["inf", "-inf", "nan", "1e999"])
def test_numbers_on_the_command_line_are_finite(number: str) -> None:
    for setting in ("generator.learning_rate", "sampler.sigma_max", "partition.alpha", "resources.away_seconds"):
        with pytest.raises(ConfigError, match=setting):
            make_config(overrides=[f"--{setting}={number}"])


@pytest.mark.parametrize("name", [r"$\bad{$", "$x", "$a$", r"\$", r"a\$b$c", "_^{}%#&~", "皮肤", r"$\frac{1}{"])
def test_names_of_classes_are_drawn_as_they_are(name: str) -> None:
    others = [name, "other"]
    figures = [
        plots.confusion_plot([[1, 2], [3, 4]], others, name),
        plots.partition_plot(np.ones((1, 2), int), [name], others),
        plots.recall_plot({0: 1.0}, {0: 0.5}, others),
        plots.comparison_plot({name: {"announced/accuracy": 0.5}}, {name: [0.1, 0.2]}),
        plots.sample_grid({0: np.ones((2, 8, 8, 1), np.uint8)}, {0: np.ones((2, 8, 8, 1), np.uint8)}, others, name),
    ]
    for figure in figures:
        figure.savefig(io.BytesIO(), format="png")
