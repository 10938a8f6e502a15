"""Data that cannot be used are refused in a helpful line or two, before anything is trained."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import write_npz
from opened_sources import refusal, source_at, write_folder
from PIL import Image
from rich.console import Console

from fedfactory_ray.data.readers import open_source
from fedfactory_ray.data.source import inspect
from fedfactory_ray.errors import ConfigError, DataInvalidError
from fedfactory_ray.pipeline.export import export_modules
from fedfactory_ray.pipeline.survey import check_files, refuse_resolution
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.data import DataConfig


@pytest.mark.parametrize(("side", "mend"), [(27, 28), (63, 64), (1, 2)])
def test_a_side_that_the_network_cannot_halve_is_a_refusal(tmp_path: Path, side: int, mend: int) -> None:
    config = Config.model_validate({"data": {"source": str(write_folder(tmp_path / "data", side=side))}})
    with pytest.raises(ConfigError, match=rf"resolution {side}.*data\.resolution={mend}"):
        refuse_resolution(config, inspect(source_at(tmp_path / "data"))[0])
    with pytest.raises(ConfigError, match=rf"data\.resolution={mend}"):
        export_modules(config, "a", str(tmp_path / "exchange"), Console(file=io.StringIO()), device="cpu")


def test_images_that_are_not_square_are_told_the_setting_that_mends_them(tmp_path: Path) -> None:
    wide = np.zeros((120, 8, 10, 1), np.uint8)
    whole = {f"{split}_images": wide[:n] for split, n in (("train", 120), ("val", 60), ("test", 60))}
    file = write_npz(tmp_path / "wide.npz", **whole)
    assert "data.resolution" in refusal(file)
    info, _ = inspect(source_at(file, resolution=8))
    assert info.resolution == 8


def test_splits_of_different_sides_are_read_at_a_resolution(tmp_path: Path) -> None:
    file = write_npz(tmp_path / "mixed.npz", test_images=np.zeros((60, 12, 12, 1), np.uint8))
    message = refusal(file)
    assert "mixed shapes" in message
    assert "data.resolution" in message
    info, _ = inspect(source_at(file, resolution=8))
    assert (info.resolution, source_at(file, resolution=8).images("test").shape) == (8, (60, 8, 8, 1))
    coloured = write_npz(tmp_path / "coloured.npz", test_images=np.zeros((60, 8, 8, 3), np.uint8))
    assert "mixed shapes" in refusal(coloured, resolution=8)


def test_a_truncated_test_image_is_found_by_the_survey(tmp_path: Path) -> None:
    write_folder(tmp_path, side=64, splits=("train", "val", "test"))
    noise = np.random.RandomState(0).randint(0, 256, (64, 64)).astype(np.uint8)
    file = tmp_path / "test" / "cat" / "1.png"
    Image.fromarray(noise).save(file)
    content = file.read_bytes()
    assert check_files(source_at(tmp_path)) == 0
    file.write_bytes(content[:2000])
    inspect(source_at(tmp_path))
    with pytest.raises(DataInvalidError) as error:
        check_files(source_at(tmp_path))
    assert str(file) in str(error.value)
    assert check_files(source_at(tmp_path), seconds=0) == 12, "what there was no time for is counted"


def test_a_damaged_test_array_is_found_by_the_survey(tmp_path: Path) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (60, 32, 32, 1)).astype(np.uint8)
    arrays = {f"{split}_images": np.resize(noise, (n, 32, 32, 1)) for split, n in (("train", 120), ("val", 60))}
    file = write_npz(tmp_path / "a.npz", **arrays, test_images=noise)
    assert check_files(source_at(file)) == 0
    with zipfile.ZipFile(file) as archive:
        place = archive.getinfo("test_images.npy").header_offset + 1000
    content = bytearray(file.read_bytes())
    content[place : place + 8] = bytes(8)
    file.write_bytes(content)
    inspect(source_at(file))
    with pytest.raises(DataInvalidError, match=r"corrupt file \(test_images"):
        check_files(source_at(file))


def test_further_pictures_of_a_file_are_told(tmp_path: Path) -> None:
    write_folder(tmp_path)
    pages = [Image.new("L", (8, 8), shade) for shade in (1, 2, 3)]
    pages[0].save(tmp_path / "train" / "cat" / "stack.tif", save_all=True, append_images=pages[1:])
    info, _ = inspect(source_at(tmp_path))
    assert info.counts["train"] == [4, 3]
    assert info.skipped == {"further pictures of files that hold several": 2}


@pytest.mark.parametrize(
    ("source", "found", "needed"),
    [
        ("table.csv", "a .csv file", "an .npz"),
        ("array.npy", "a .npy file", "an .npz"),
        ("pictures.zip", "arrays train/cat/0.png", "train_images"),
        ("https://example.org/x.npz", "an address", "every node can read"),
    ],
)
def test_what_is_no_source_is_told_what_is(tmp_path: Path, source: str, found: str, needed: str) -> None:
    (tmp_path / "table.csv").write_text("x,y\n1,2\n")
    np.save(tmp_path / "array.npy", np.zeros((3, 8, 8), np.uint8))
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.writestr("train/cat/0.png", "x")
    with pytest.raises(DataInvalidError, match=f"(?s){found}.*{needed}"):
        open_source(DataConfig(source=source if "://" in source else str(tmp_path / source)))


def test_an_enormous_image_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    file = write_folder(tmp_path) / "train" / "dog" / "1.png"
    Image.new("L", (20, 20)).save(file)
    message = refusal(tmp_path)
    assert str(file) in message
    assert "200 pixels" in message


def test_a_label_far_beyond_the_others_is_told_in_a_line(tmp_path: Path) -> None:
    labels = np.append(np.arange(119) % 3, 255).astype(np.uint8)
    message = refusal(write_npz(tmp_path / "a.npz", train_labels=labels))
    assert "no training image of class 3, 4, 5, 6, 7 and 247 more" in message
    assert "label 255" in message


def test_arrays_of_other_names_are_told_theirs(tmp_path: Path) -> None:
    np.savez(tmp_path / "keras.npz", x_train=np.zeros((2, 8, 8), np.uint8), y_train=np.zeros(2, np.uint8))
    message = refusal(tmp_path / "keras.npz")
    assert "x_train, y_train" in message
    assert "train_images=x_train" in message


def test_fortran_order_is_told_how_to_be_mended(tmp_path: Path) -> None:
    pixels = np.asfortranarray(np.zeros((120, 8, 8, 1), np.uint8))
    message = refusal(write_npz(tmp_path / "a.npz", train_images=pixels))
    assert "Fortran order" in message
    assert "np.ascontiguousarray" in message
    objects = np.array([None] * 120)
    assert "object" in refusal(write_npz(tmp_path / "b.npz", train_labels=objects))
