"""Modules that come as files are trusted only as far as they verify."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from made_modules import GENERATOR, write_module
from ray.exceptions import RayError

from fedfactory_ray.cluster.failures import find_refusal
from fedfactory_ray.data.source import DataInfo
from fedfactory_ray.errors import DataMissingError, ModuleRefusedError
from fedfactory_ray.federation.exchange import import_modules, offered_cards
from fedfactory_ray.generation import module
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.storage.files import Storage

INFO = DataInfo(["a", "b"], 8, 1, {})


@pytest.fixture
def exchange(tmp_path: Path) -> Path:
    for client, label in (("north", 0), ("north", 1), ("south", 1)):
        write_module(tmp_path / "exchange", client, label)
    return tmp_path / "exchange"


def take(exchange: Path, run: Path) -> list[ModuleCard]:
    cards = offered_cards(str(exchange), INFO)
    try:
        import_modules(str(exchange), Storage(str(run)), cards)
    except RayError as error:
        raise find_refusal(error) or error from None
    return cards


def test_what_verifies_is_copied_byte_for_byte(cluster: None, exchange: Path, tmp_path: Path) -> None:
    (exchange / "modules" / "north" / "config.json").write_text("{}")
    cards = take(exchange, tmp_path / "run")
    assert [card.key for card in cards] == [("north", 0), ("north", 1), ("south", 1)]
    for card in cards:
        for name in ("model.safetensors", "card.json"):
            there = exchange / card.folder / name
            assert (tmp_path / "run" / card.folder / name).read_bytes() == there.read_bytes()


def change_card(folder: Path, **changes: object) -> None:
    path = folder / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def corrupt(folder: Path) -> None:
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (folder / "model.safetensors").write_bytes(weights)


def truncate(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])


def pickled(folder: Path) -> None:
    weights = pickle.dumps({"unet.conv_in.weight": [0.0] * 10_000})
    (folder / "model.safetensors").write_bytes(weights)
    change_card(folder, files={"model.safetensors": module.digest(weights)}, size=len(weights))


def rename(folder: Path) -> None:
    shutil.move(folder, folder.parent / "class-000x")
    shutil.move(folder.parent / "class-000x", folder.parent.parent / "south" / "class-000")


def other_network(folder: Path) -> None:
    change_card(folder, generator=GENERATOR.model_copy(update={"channels": (16,)}).model_dump(mode="json"))


@pytest.mark.parametrize(
    ("damage", "client", "reason"),
    [
        (corrupt, "north", "SHA-256"),
        (truncate, "north", "bytes, its card says"),
        (pickled, "north", "not safetensors"),
        (rename, "south", "it lies in the folder of 'south', class 0, its card says 'north', 0"),
        (other_network, "north", r"a network of \d+ numbers"),
        (lambda folder: change_card(folder, generator={"channels": [7]}), "north", "multiple of norm_groups"),
        (lambda folder: change_card(folder, extra=1), "north", r"its card cannot be read[\s\S]*found:  extra"),
        (lambda folder: change_card(folder, format=3, more=1), "north", r"format 3 \(more\), where 2 is known"),
        (lambda folder: change_card(folder, n_images="many"), "north", r"its card cannot be read[\s\S]*n_images"),
        (lambda folder: change_card(folder, files={"model.safetensors": "0", "x": "0"}), "north", "it is of files"),
        (lambda folder: (folder / "card.json").write_text("{"), "north", "its card cannot be read"),
        (lambda folder: change_card(folder, resolution=16), "north", "side 16"),
        (lambda folder: change_card(folder, n_images=0), "north", "trained on 0 images"),
        (lambda folder: (folder / "model.safetensors").unlink(), "north", "model.safetensors is missing"),
    ],
)
def test_what_does_not_verify_is_refused_by_its_clients_name(
    cluster: None, exchange: Path, tmp_path: Path, damage: Callable[[Path], None], client: str, reason: str
) -> None:
    damage(exchange / "modules" / "north" / "class-000")
    with pytest.raises(ModuleRefusedError, match=reason) as refusal:
        take(exchange, tmp_path / "run")
    assert refusal.value.client == client
    assert f"client {client!r}, class 0" in str(refusal.value)
    assert not (tmp_path / "run" / "modules" / "north" / "class-000").exists()


def test_a_class_that_the_data_set_has_not_is_refused(exchange: Path) -> None:
    write_module(exchange, "south", 2)
    with pytest.raises(ModuleRefusedError, match=r"'south', class 2.*class 2, the data set has 2"):
        offered_cards(str(exchange), INFO)


def test_an_empty_folder_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match=r"modules/<client>/class-<y>/card.json[\s\S]*train_client"):
        offered_cards(str(tmp_path), INFO)
