"""The survey: what every kind of source tells, without the driver opening one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_npz
from PIL import Image
from small_runs import SOURCES, reads_no_image

from fedfactory_ray.data.readers import open_source
from fedfactory_ray.errors import DataMissingError
from fedfactory_ray.pipeline.survey import read_images, survey, survey_here, try_files
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.artefact import fingerprint


def write_folder(path: Path) -> Path:
    """A folder of images: two classes, two images each."""
    for split in ("train", "test"):
        for label in range(2):
            for i in range(2):
                file = path / split / f"class-{label}" / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.random.RandomState(9 * label + i).randint(0, 256, (8, 8), np.uint8)
                Image.fromarray(pixels).save(file)
    return path


def natural(folder: Path) -> dict[str, Any]:
    whole = write_npz(folder / "whole.npz")
    silos = [{"name": name, "source": str(whole)} for name in ("north", "south")]
    return {"data": {"source": str(whole)}, "partition": {"scheme": "natural", "silos": silos}}


KINDS = {
    "Digits": lambda folder: {},
    "ArrayFile": lambda folder: {"data": {"source": str(write_npz(folder / "stripes.npz"))}},
    "ImageFolder": lambda folder: {
        "data": {"source": str(write_folder(folder / "pictures"))},
        "partition": {"min_size": 1},
    },
    "natural": natural,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_driver_reads_no_image_of_any_kind_of_source(cluster: None, tmp_path: Path, kind: str) -> None:
    config = Config.model_validate(KINDS[kind](tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        reads_no_image(patch)
        with pytest.raises(AssertionError, match="the driver read"):
            open_source(config.data).images("test")
        told = survey_here(config)
        info, partition, _ = survey(config)
        if kind == "natural":
            assert told is None, "a silo's source is its own nodes' affair"
        else:
            assert told is not None
            assert (told[0], told[1].sha256) == (info, partition.sha256), "this machine sees what a node does"
        try_files(config)
        partition = read_images(config, partition, info)
    source = open_source(config.data)
    assert type(source).__name__ in (kind, "ArrayFile")
    assert info.class_names == source.class_names
    labels = source.labels("train")
    for client, label, indices in partition:
        images = source.images("train", np.flatnonzero(labels == label)[indices] if kind == "natural" else indices)
        assert partition.images_sha256[client, label] == fingerprint(images)


def test_a_silo_that_is_left_out_need_not_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been forgotten, and its images deleted."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests of this process may be on a cluster
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    tree = natural(tmp_path)
    tree["partition"]["silos"][1]["source"] = str(tmp_path / "gone.npz")
    with pytest.raises(DataMissingError, match=r"gone\.npz"):
        survey_here(Config.model_validate(tree))
    tree["partition"]["exclude"] = ["south"]
    assert survey_here(Config.model_validate(tree)) is None


def test_medmnist_is_such_a_file_and_cifar10_is_refused_by_a_worker(
    cluster: None, real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads_no_image(monkeypatch)
    data = {"source": "medmnist:retinamnist", "root": str(real_data), "download": False}
    config = Config.model_validate({"data": data})
    info, partition, _ = survey(config)
    assert len(read_images(config, partition, info).images_sha256) == 5
    with pytest.raises(Exception, match=r"cifar-10[\s\S]*expected MD5"):
        survey(Config.model_validate({"data": {"source": "cifar10", "root": str(tmp_path), "download": False}}))
    assert {kind.__name__ for kind in SOURCES} == {"Digits", "ArrayFile", "ImageFolder", "Cifar10"}


def test_many_images_are_read_some_shares_at_a_time(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.model_validate({"data": {"source": str(write_npz(tmp_path / "stripes.npz"))}})
    info, partition, _ = survey(config)
    whole = read_images(config, partition, info).images_sha256
    monkeypatch.setattr("fedfactory_ray.pipeline.survey.READ_AT_ONCE", 6000)  # two of three shares of 40 · 64 bytes
    assert read_images(config, partition, info).images_sha256 == whole


def test_pixels_that_were_replaced_in_place_are_noticed(cluster: None, tmp_path: Path) -> None:
    file = write_npz(tmp_path / "stripes.npz")
    config = Config.model_validate({"data": {"source": str(file)}})
    info, dealt, _ = survey(config)
    before = read_images(config, dealt, info)
    arrays = dict(np.load(file))
    arrays["train_images"][1] ^= 1  # of class 1
    np.savez_compressed(file, **arrays)
    after = read_images(config, dealt, info)
    assert after.sha256 == before.sha256
    changed = {key for key in before.images_sha256 if after.images_sha256[key] != before.images_sha256[key]}
    assert changed == {("client-001", 1)}
    assert json.dumps(after.content) != json.dumps(before.content)
