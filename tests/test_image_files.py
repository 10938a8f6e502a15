"""Folders as people have them: what lies in them that is no image, and how images are seen."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from opened_sources import refusal, source_at, write_folder
from PIL import Image

from fedfactory_ray.data.image_files import image_suffixes
from fedfactory_ray.data.source import inspect, told_skipped
from fedfactory_ray.errors import DataInvalidError

# Hidden folders and files


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "@eaDir", "__MACOSX", "lost+found"])
def test_hidden_folders_are_no_classes_and_hold_no_images(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path)
    for place in (tmp_path, tmp_path / "train", tmp_path / "test", tmp_path / "train" / "cat"):
        (place / name).mkdir()
        Image.new("L", (9, 9)).save(place / name / "0.png")
    info, labels = inspect(source_at(tmp_path))
    assert info.class_names == ["cat", "dog"]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert info.skipped == {"hidden folders": 4}


def test_hidden_files_of_archives_are_skipped(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "train" / ".DS_Store").write_bytes(b"x")
    info, labels = inspect(source_at(tmp_path))
    assert (len(labels), info.skipped) == (6, {"hidden files": 2})


def test_a_folder_below_a_hidden_one_is_read(tmp_path: Path) -> None:
    info, labels = inspect(source_at(write_folder(tmp_path / ".cache" / "pictures")))
    assert (len(labels), info.skipped) == (6, {})


# What is transparent or turned


def write_all(root: Path, image: Image.Image, file: str, **how: object) -> Path:
    """Two classes, an image each."""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            image.save(root / split / name / file, **how)  # type: ignore[arg-type]
    return root


def test_images_are_turned_upright(tmp_path: Path) -> None:
    stored = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3)
    turned = Image.Exif()
    turned[0x0112] = 6  # "rotate by 90 degrees, clockwise, to view"
    for name, suffix in (("png", "0.png"), ("tif", "0.tif")):
        images = source_at(write_all(tmp_path / name, stored, suffix, exif=turned)).images("train")
        assert np.array_equal(images[0, :, :, 0], np.rot90(np.asarray(stored), -1)), name
    wide = write_all(tmp_path / "wide", Image.new("L", (16, 8)), "0.jpg", exif=turned)
    assert source_at(wide, resolution=8).images("test").shape == (2, 8, 8, 1)


def transparent(mode: str) -> Image.Image:
    """Left half opaque grey 100, right half transparent over garbage."""
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:, :4] = 255
    grey = np.full((8, 8), 100, np.uint8)
    grey[:, 4:] = 7
    if mode == "P":
        image = Image.fromarray((grey == 7).astype(np.uint8)).convert("P")
        image.putpalette([100] * 3 + [7] * 3 + [0] * 762)
        return image
    layers = [grey] * (3 if mode == "RGBA" else 1)
    return Image.merge(mode, [Image.fromarray(layer) for layer in (*layers, alpha)])


@pytest.mark.parametrize(("mode", "channels"), [("RGBA", 3), ("LA", 1), ("P", 3)])
def test_what_is_transparent_shows_the_background(tmp_path: Path, mode: str, channels: int) -> None:
    how = {"transparency": 1} if mode == "P" else {}
    write_all(tmp_path, transparent(mode), "0.png", **how)
    info, _ = inspect(source_at(tmp_path))
    images = source_at(tmp_path).images("train")
    assert (info.channels, images.shape[3]) == (channels, channels)
    assert (images[:, :, :4] == 100).all()
    assert (images[:, :, 4:] == 255).all()
    black = source_at(tmp_path, background="#000000").images("train")
    assert (black[:, :, 4:] == 0).all()
    red = source_at(tmp_path, background="red").images("train")
    assert (red[:, :, 4:] == (255, 0, 0)).all()
    assert (red[:, :, :4] == 100).all()


def test_a_background_that_is_no_colour_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"background 'wihte'.*#rrggbb"):
        source_at(tmp_path, background="wihte")


def test_damaged_orientation_is_read_or_refused_by_name(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    write_all(tmp_path, Image.new("L", (8, 8), 9), "0.jpg", exif=turned)
    file = tmp_path / "train" / "cat" / "0.jpg"
    content = file.read_bytes()
    start, crashed = content.index(b"Exif"), []
    for place in range(start, start + 32):
        for bits in (0x15, 0xFF):
            spoilt = bytearray(content)
            spoilt[place] ^= bits
            file.write_bytes(spoilt)
            try:
                source_at(tmp_path).images("train")
            except DataInvalidError as error:
                assert str(file) in str(error)
            except Exception as error:  # noqa: BLE001
                crashed.append((place - start, repr(error)[:80]))
    assert not crashed


# Kinds of files


@pytest.mark.parametrize("suffix", ["gif", "jfif", "TIF", "bmp", "JPG", "jp2", "webp"])
def test_every_kind_of_image_is_read_whatever_its_letters(tmp_path: Path, suffix: str) -> None:
    source = source_at(write_all(tmp_path, Image.new("RGB", (8, 8), (50, 60, 70)), f"0.{suffix}"))
    info, labels = inspect(source)
    assert (len(labels), info.channels, info.skipped) == (2, 3, {})
    assert np.abs(source.images("train").astype(int) - (50, 60, 70)).max() <= 6


def test_no_other_program_is_run_and_no_container_taken_for_an_image() -> None:
    assert {".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"} <= image_suffixes()
    assert not image_suffixes() & {".eps", ".ps", ".pdf", ".h5", ".mpg", ".wmf", ".txt", ".npy"}


def test_skipped_files_are_counted_by_kind_and_told_in_one_line(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for file in ("cat/a.txt", "cat/b.TXT", "dog/c.heic", "dog/README", "labels.csv", "dog/._x.png"):
        (tmp_path / "train" / file).write_bytes(b"x")
    info, labels = inspect(source_at(tmp_path))
    assert len(labels) == 6
    line = told_skipped("here", info.skipped)
    for part in ("2 .txt files", "1 .heic files", "1 nameless files", "1 files beside the class folders", "1 hidden"):
        assert part in line
    assert "\n" not in line


def test_a_class_of_unreadable_files_alone_is_told_what_was_skipped(tmp_path: Path) -> None:
    for file in (write_folder(tmp_path) / "train" / "dog").iterdir():
        file.rename(file.with_suffix(".heic"))
    message = refusal(tmp_path)
    assert "no training image of class dog" in message
    assert "3 .heic files" in message


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_split_may_have_any_of_its_names(tmp_path: Path, name: str) -> None:
    info, _ = inspect(source_at(write_folder(tmp_path, splits=("train", name, "test"))))
    assert info.counts["val"] == [3, 3]


def test_accents_spelt_in_two_ways_are_one_class_and_capitals_of_splits_do_not_count(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for split, form in (("train", "NFC"), ("test", "NFD")):
        (tmp_path / split / "cat").rename(tmp_path / split / unicodedata.normalize(form, "chât"))  # type: ignore[arg-type]
    (tmp_path / "train").rename(tmp_path / "Train")
    names = tuple(unicodedata.normalize("NFD", name) for name in ("chât", "dog"))
    for changes in ({}, {"class_names": names}):
        info, labels = inspect(source_at(tmp_path, **changes))
        assert info.class_names == ["chât", "dog"]
        assert info.counts["test"] == [3, 3]
        assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_two_validation_splits_are_refused(tmp_path: Path) -> None:
    assert "val and valid" in refusal(write_folder(tmp_path, splits=("train", "val", "valid", "test")))


# Layouts


def test_a_missing_test_split_is_named_beside_what_there_is(tmp_path: Path) -> None:
    message = refusal(write_folder(tmp_path, splits=("train", "valid")))
    assert "no test images: train 6, val 6, test 0" in message
    assert "test/<class>/" in message


def test_one_class_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for file in tmp_path.glob("*/dog/*"):
        file.unlink()
    for folder in tmp_path.glob("*/dog"):
        folder.rmdir()
    message = refusal(tmp_path)
    assert "one class, cat" in message
    assert "two classes" in message


def test_classes_without_splits_and_splits_without_classes_are_told_the_layout(tmp_path: Path) -> None:
    for name in ("airplane", "bear", "cat"):
        (tmp_path / name).mkdir()
    (tmp_path / "test").mkdir()
    message = refusal(tmp_path)
    for part in ("test/ with 0 class folders", "no train/", "folders airplane, bear, cat", "train/<class>/"):
        assert part in message
