"""Names that the product makes are made of the characters that it takes back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedfactory_ray.errors import ConfigError, UnlearningError
from fedfactory_ray.pipeline.session import run_name
from fedfactory_ray.settings.command_line import make_config, stored_config
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.data import NAME, DataConfig
from fedfactory_ray.storage.artefact import fingerprint
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.unlearning.request import make_request


def name_of(source: str) -> str:
    return run_name(Config(data=DataConfig(source=source)))


@pytest.mark.parametrize(
    ("source", "start"),
    [
        ("my data.npz", "my-data-silos-"),
        ("皮肤.npz", "data-silos-"),
        ("Läsionen (neu)", "Lasionen-neu-silos-"),
        ("..", ""),
        (".", ""),
        ("/", "data-silos-"),
        ("~", "data-silos-"),
        (".hidden.npz", "hidden-silos-"),
        ("-x-.npz", "x-silos-"),
        ("[benign]/100%?#&.npz", "100-silos-"),
        ("a\nb.npz", "a-b-silos-"),
    ],
)
def test_default_names_are_allowed_names(source: str, start: str) -> None:
    name = name_of(source)
    assert re.fullmatch(NAME, name)
    assert name.startswith(start)
    assert make_config(overrides=["--name", name]).name == name
    for address in ("file:///runs", "s3://bucket/runs?region=eu-west-1"):
        assert Storage(address).within(name).name == name


def test_two_sources_of_one_name_have_runs_of_their_own() -> None:
    assert name_of("皮肤.npz") != name_of("血液.npz")


@pytest.mark.parametrize(
    ("source", "stem"),
    [
        ("digits", "digits"),
        ("medmnist:bloodmnist", "bloodmnist"),
        ("/a/my_data.v2.npz", "my_data"),
        ("pictures/Skin-7/", "Skin-7"),
        ("a--b-.npz", "a--b-"),
    ],
)
def test_names_that_were_allowed_stay(source: str, stem: str) -> None:
    settings = Config(data=DataConfig(source=source)).determining()
    assert name_of(source) == f"{stem}-silos-seed0-{fingerprint(settings)[:8]}"


def test_a_run_that_had_a_name_of_other_characters_is_found_and_its_successor_has_an_allowed_one(
    tmp_path: Path,
) -> None:
    where = ["--storage.uri", str(tmp_path)]
    for name in ("my data-silos-seed0-00000000", "-silos-seed0-00000000"):
        Storage(str(tmp_path)).within(name).write_json("settings.json", {"name": name})
        assert stored_config(name, where).name == name
        request = make_request(name, {"a": [0], "b": [1]}, [], ["a"], [], None, "me")
        assert request.successor.endswith("silos-seed0-00000000-without-a")
        assert re.fullmatch(NAME, request.successor)
    for name in ("../elsewhere", "", ".", "a/b"):
        with pytest.raises(ConfigError, match="name"):
            stored_config(name, where)


def test_a_successor_is_given_an_allowed_name() -> None:
    with pytest.raises(UnlearningError, match=r"a b[\s\S]*letters, digits"):
        make_request("small", {"a": [0], "b": [1]}, [], ["a"], [], "a b", "me")
