"""Folders of images: read as they are, resized as array files are, refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from opened_sources import refusal, source_at, write_folder
from PIL import Image

from fedfactory_ray.data.image_folder import ImageFolder
from fedfactory_ray.data.source import inspect
from fedfactory_ray.data.transforms import resize_batch
from fedfactory_ray.errors import DataInvalidError


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_image_folder_reads_classes_and_pixels(tmp_path: Path, mode: str, channels: int) -> None:
    source = source_at(write_folder(tmp_path, mode=mode))
    info, labels = inspect(source)
    assert (info.class_names, info.resolution, info.channels) == (["cat", "dog"], 8, channels)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert info.counts == {"train": [3, 3], "val": [0, 0], "test": [3, 3]}
    images = source.images("train", np.array([5, 0, 0, 1]))
    assert images.shape == (4, 8, 8, channels)
    assert images.dtype == np.uint8
    assert images[:, 3, 3, 0].tolist() == [80, 0, 0, 10]
    if channels == 3:
        assert (images[..., 1:] == (1, 2)).all()


def test_one_coloured_image_makes_a_folder_rgb(tmp_path: Path) -> None:
    write_folder(tmp_path, splits=("train", "val", "test"))
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "val" / "cat" / "0.png")
    source = source_at(tmp_path)
    info, _ = inspect(source)
    assert info.channels == 3
    assert source.images("train")[1, 0, 0].tolist() == [10, 10, 10]
    assert source.images("val")[0, 0, 0].tolist() == [1, 2, 3]
    assert info.counts["val"] == [3, 3]


def test_image_folder_resizes_mixed_shapes(tmp_path: Path) -> None:
    write_folder(tmp_path)
    Image.new("L", (30, 20), 77).save(tmp_path / "test" / "dog" / "2.png")
    message = refusal(tmp_path)
    assert str(tmp_path) in message
    assert "mixed shapes [(8, 8), (30, 20)]" in message
    source = source_at(tmp_path, resolution=16)
    info, _ = inspect(source)
    assert info.resolution == 16
    assert source.images("test").shape == (6, 16, 16, 1)
    assert (source.images("test")[5] == 77).all()


def test_image_folder_resizes_as_array_files_do(tmp_path: Path) -> None:
    write_folder(tmp_path, n=1)
    picture = np.random.RandomState(0).randint(0, 256, (20, 8, 3)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "train" / "cat" / "0.png")
    images = ImageFolder(tmp_path, 5).images("train", np.array([0]))
    assert np.array_equal(images, resize_batch(picture[None], 5))


def test_sixteen_bit_grey_images_keep_their_contrast_or_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, n=1)
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            Image.fromarray(ramp).save(tmp_path / split / name / "0.png")
    source = source_at(tmp_path)
    try:
        inspect(source)
        pixels = source.images("train")[0, :, :, 0]
    except DataInvalidError as error:
        assert "I;16" in str(error)
        return
    assert np.abs(pixels.astype(int) - ramp // 256).max() <= 1


def test_an_image_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    file = write_folder(tmp_path) / "test" / "dog" / "1.png"
    file.write_bytes(b"not an image")
    assert str(file) in refusal(tmp_path)


def test_a_truncated_image_is_refused_by_name(tmp_path: Path) -> None:
    file = write_folder(tmp_path, side=64) / "train" / "cat" / "1.png"
    noise = np.random.RandomState(0).randint(0, 256, (64, 64)).astype(np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(DataInvalidError, match="an intact image file") as error:
        source_at(tmp_path).images("train")
    assert str(file) in str(error.value)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_damaged_images_are_read_or_refused_by_name(tmp_path: Path, suffix: str) -> None:
    write_folder(tmp_path, n=1, side=180)
    file = tmp_path / "train" / "cat" / f"0.{suffix}"
    (tmp_path / "train" / "cat" / "0.png").unlink()
    noise = np.random.RandomState(0).randint(0, 256, (180, 180, 3)).astype(np.uint8)
    Image.fromarray(noise).save(file)
    content = file.read_bytes()
    # The header, spots all over, and every chunk's length and name.
    starts = [i for i in range(len(content)) if content[i : i + 4] in (b"IHDR", b"IDAT", b"IEND")]
    places = {*range(0, 48, 3), *range(0, len(content), len(content) // 12), *(s + d for s in starts for d in (-3, 1))}
    refused, crashed = 0, []
    for place in sorted(places):
        spoilt = bytearray(content)
        spoilt[place] ^= 0x15
        file.write_bytes(spoilt)
        try:
            source_at(tmp_path, resolution=8).images("train")
        except DataInvalidError as error:
            assert str(file) in str(error)
            refused += 1
        except Exception as error:  # noqa: BLE001
            crashed.append((place, repr(error)[:80]))
    assert refused
    assert not crashed, f"{len(crashed)} damages ended otherwise: {crashed[:5]}"


def test_a_stranger_folder_in_test_is_refused(tmp_path: Path) -> None:
    (write_folder(tmp_path) / "test" / "horse").mkdir()
    message = refusal(tmp_path)
    assert "horse" in message
    assert str(tmp_path / "test") in message


def test_a_class_without_training_images_is_refused_by_name(tmp_path: Path) -> None:
    for file in (write_folder(tmp_path) / "train" / "dog").iterdir():
        file.unlink()
    assert "no training image of class dog" in refusal(tmp_path)


def test_folders_without_splits_or_classes_are_refused(tmp_path: Path) -> None:
    assert "no train/, no val/, no test/" in refusal(tmp_path)
    (tmp_path / "train").mkdir()
    assert "train/ with 0 class folders" in refusal(tmp_path)
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / "train" / name / "1.png")
    assert "no test images" in refusal(tmp_path)
