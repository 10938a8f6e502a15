import hashlib
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import write_npz
from opened_sources import refusal
from PIL import Image

from fedfactory_ray.data.readers import open_source
from fedfactory_ray.data.source import inspect
from fedfactory_ray.data.transforms import resize_batch
from fedfactory_ray.errors import DataInvalidError, DataMissingError
from fedfactory_ray.settings.data import DataConfig

SPLITS = ("train", "val", "test")


# Digits


def test_digits_are_dealt_out_whole_and_once() -> None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    scaled = np.round(pixels * 255 / 16).astype(np.uint8)
    everything = Counter((row.tobytes(), int(y)) for row, y in zip(scaled, labels, strict=True))
    source = open_source(DataConfig(source="digits"))
    dealt = Counter(
        (image.tobytes(), int(y))
        for split in SPLITS
        for image, y in zip(source.images(split), source.labels(split), strict=True)
    )
    assert dealt == everything
    assert sum(dealt.values()) == 1797


def test_digits_splits_are_stratified_and_the_same_every_time() -> None:
    source, again = open_source(DataConfig(source="digits")), open_source(DataConfig(source="digits"))
    counts = np.array([np.bincount(source.labels(split), minlength=10) for split in SPLITS])
    shares = np.array([[0.6], [0.1], [0.3]]) * counts.sum(0)
    assert np.abs(counts - shares).max() <= 1
    for split in SPLITS:
        assert np.array_equal(source.images(split), again.images(split))


def test_digits_are_read_by_index() -> None:
    source = open_source(DataConfig(source="digits"))
    indices = np.array([7, 3, 3, 1000])
    assert np.array_equal(source.images("train", indices), source.images("train")[indices])
    assert source.image_shape() == (8, 8, 1) == source.images("test").shape[1:]


def test_digits_take_the_resolution() -> None:
    source = open_source(DataConfig(source="digits", resolution=12))
    assert source.image_shape() == (12, 12, 1) == source.images("val").shape[1:]
    plain = open_source(DataConfig(source="digits"))
    assert np.array_equal(source.images("val"), resize_batch(plain.images("val"), 12))


def test_digits_facts() -> None:
    source = open_source(DataConfig(source="digits"))
    info, labels = inspect(source)
    assert (info.classes, info.resolution, info.channels) == (10, 8, 1)
    assert info.class_names == list("0123456789")
    assert np.array_equal(labels, source.labels("train"))
    assert info.counts["test"] == np.bincount(source.labels("test")).tolist()


# MedMNIST


@pytest.mark.parametrize(("flag", "name"), [("retinamnist", "RetinaMNIST"), ("breastmnist", "BreastMNIST")])
def test_medmnist_sets_equal_the_official_loader(real_data: Path, flag: str, name: str) -> None:
    import medmnist

    source = open_source(DataConfig(source=f"medmnist:{flag}", root=str(real_data), download=False))
    info, _ = inspect(source)
    for split in ("train", "val", "test"):
        official = getattr(medmnist, name)(split=split, root=str(real_data), download=False)
        images = source.images(split)  # type: ignore[arg-type]
        assert np.array_equal(images.squeeze(), official.imgs.squeeze())
        assert np.array_equal(source.labels(split), official.labels[:, 0])  # type: ignore[arg-type]
        assert images.shape[1:] == source.image_shape() == (28, 28, info.channels)
    assert info.channels == medmnist.INFO[flag]["n_channels"]
    assert info.class_names == [medmnist.INFO[flag]["label"][str(y)] for y in range(info.classes)]


def test_a_medmnist_file_of_another_checksum_is_refused(real_data: Path, tmp_path: Path) -> None:
    from medmnist import INFO

    path = tmp_path / "breastmnist.npz"
    shutil.copyfile(real_data / "breastmnist.npz", path)
    path.chmod(0o644)
    with path.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DataInvalidError) as error:
        open_source(DataConfig(source="medmnist:breastmnist", root=str(tmp_path), download=False))
    assert str(path) in str(error.value)
    assert INFO["breastmnist"]["MD5"] in str(error.value)


@pytest.mark.parametrize(("size", "suffix"), [(28, ""), (128, "_128")])
def test_a_missing_medmnist_file_is_told_with_path_and_checksum(tmp_path: Path, size: int, suffix: str) -> None:
    from medmnist import INFO

    with pytest.raises(DataMissingError) as error:
        open_source(
            DataConfig.model_validate(
                {"source": "medmnist:pathmnist", "root": str(tmp_path), "download": False, "size": size}
            )
        )
    assert str(tmp_path / f"pathmnist{suffix}.npz") in str(error.value)
    assert INFO["pathmnist"][f"MD5{suffix}"] in str(error.value)


# CIFAR-10


def test_missing_cifar10_is_told_with_its_checksum(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError) as error:
        open_source(DataConfig(source="cifar10", root=str(tmp_path), download=False))
    assert str(tmp_path) in str(error.value)
    assert "c58f30108f718f92721af3b95e74349a" in str(error.value)


def test_cifar10_batches_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (20, 3, 32, 32)).astype(np.uint8)

    def batch(name: str, chosen: slice) -> list[list[str]]:
        labels = (np.arange(20) % 10).tolist()[chosen]
        content = pickle.dumps({"data": pixels[chosen].reshape(-1, 3072), "labels": labels})
        (folder / name).write_bytes(content)
        return [[name, hashlib.md5(content).hexdigest()]]

    meta = pickle.dumps({"label_names": list("abcdefghij")})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(CIFAR10, "train_list", batch("train", slice(0, 10)))
    monkeypatch.setattr(CIFAR10, "test_list", batch("test", slice(10, 20)))
    monkeypatch.setattr(
        CIFAR10,
        "meta",
        {"filename": "batches.meta", "key": "label_names", "md5": hashlib.md5(meta).hexdigest()},
    )
    source = open_source(DataConfig(source="cifar10", root=str(tmp_path), download=False))
    info, labels = inspect(source)
    assert (info.resolution, info.channels, info.classes) == (32, 3, 10)
    assert labels.tolist() == list(range(10))
    assert source.labels("val").size == 0
    assert np.array_equal(source.images("train", np.array([4, 1])), pixels[[4, 1]].transpose(0, 2, 3, 1))
    assert np.array_equal(source.images("test"), pixels[10:].transpose(0, 2, 3, 1))


# Parts of a data set: natural silos and what they are tested on


def test_a_folder_with_some_of_the_classes_keeps_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "train" / "dog").mkdir(parents=True)
    Image.new("L", (8, 8), 9).save(tmp_path / "train" / "dog" / "1.png")
    source = open_source(DataConfig(source=str(tmp_path), class_names=("cat", "dog", "eel")))
    info, labels = inspect(source, trains=False, tests=False)
    assert info.counts["train"] == [0, 1, 0]
    assert labels.tolist() == [1]
    assert source.images("train").shape == (1, 8, 8, 1)
    with pytest.raises(DataInvalidError, match="folders \\['dog'\\]"):
        inspect(open_source(DataConfig(source=str(tmp_path), class_names=("cat", "eel"))))


def test_a_file_with_a_test_split_alone_is_enough_to_test_on(tmp_path: Path) -> None:
    whole = dict(np.load(write_npz(tmp_path / "whole.npz")))
    np.savez(tmp_path / "test.npz", **{name: array for name, array in whole.items() if name.startswith("test_")})
    source = open_source(DataConfig(source=str(tmp_path / "test.npz")))
    info, labels = inspect(source, trains=False)
    assert (info.class_names, info.resolution, len(labels)) == (["0", "1", "2"], 8, 0)
    assert info.counts == {"train": [0, 0, 0], "val": [0, 0, 0], "test": [20, 20, 20]}
    assert "no train images" in refusal(tmp_path / "test.npz")
    np.savez(tmp_path / "half.npz", test_images=whole["test_images"])
    assert "no array 'test_labels'" in refusal(tmp_path / "half.npz")
