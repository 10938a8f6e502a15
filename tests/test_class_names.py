"""Classes are told by their names: whoever holds only some of them never trains or offers one as another."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fedfactory_ray.baselines.client import FederatedClient
from fedfactory_ray.data.readers import open_source
from fedfactory_ray.data.source import DataInfo
from fedfactory_ray.errors import ConfigError, DataInvalidError, ModuleRefusedError
from fedfactory_ray.federation.client import ClientSlot
from fedfactory_ray.federation.round import run_round
from fedfactory_ray.generation.card import module_fingerprint, read_cards
from fedfactory_ray.pipeline.export import export_modules
from fedfactory_ray.pipeline.session import open_session
from fedfactory_ray.pipeline.survey import survey
from fedfactory_ray.seeds import derive_seed
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.data import DataConfig
from fedfactory_ray.storage.artefact import fingerprint, keep
from fedfactory_ray.storage.files import Storage
from jobs import train_client

SHADES = {"circle": 40, "square": 120, "star": 200}
"""Every image of a class has its shade: the wrong class's images are seen at once."""
TINY = {"channels": [8], "min_steps": 2, "max_steps": 2, "batch_size": 4, "precision": "fp32", "min_images": 1}
OUT = Console(file=io.StringIO())


def write_shades(root: Path, counts: Mapping[str, int], split: str = "train") -> str:
    for name, n in counts.items():
        (root / split / name).mkdir(parents=True)
        for i in range(n):
            Image.new("L", (8, 8), SHADES[name] + i).save(root / split / name / f"{i}.png")
    return str(root)


def natural(folder: Path) -> Config:
    """Three classes: one silo holds the first, the other the others."""
    test = write_shades(folder / "test", dict.fromkeys(SHADES, 2), "test")
    silos = [
        {"name": "s1", "source": write_shades(folder / "s1", {"circle": 4})},
        {"name": "s2", "source": write_shades(folder / "s2", {"square": 3, "star": 5})},
    ]
    return Config.model_validate(
        {
            "name": "shades",
            "data": {"source": test},
            "partition": {"scheme": "natural", "silos": silos},
            "generator": TINY,
            "classifier": {"validation_fraction": 0.25},
            "storage": {"uri": str(folder / "runs")},
            "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        }
    )


def shades(folder: Path, name: str, n: int) -> np.ndarray:
    return np.stack([np.full((8, 8, 1), SHADES[name] + i, np.uint8) for i in range(n)])


def test_natural_silos_that_are_folders_train_the_classes_of_their_names(cluster: None, tmp_path: Path) -> None:
    with open_session(natural(tmp_path), OUT) as session:
        config, partition = session.config, session.partition
        assert {client: sorted(share) for client, share in partition.shares.items()} == {"s1": [0], "s2": [1, 2]}
        run_round(config, partition, session.plan.client, session.storage, lambda event: None)
        cards = {card.key: card for card in read_cards(session.storage)}
        for client, label, name, n in (("s1", 0, "circle", 4), ("s2", 1, "square", 3), ("s2", 2, "star", 5)):
            seed, digest = derive_seed(0, "train", client, label), fingerprint(shades(tmp_path, name, n))
            facts = {"precision": "fp32", "threads": 1, "seed": seed, "images_sha256": digest}
            assert cards[client, label].fingerprint == module_fingerprint(config.generator, **facts)  # type: ignore[arg-type]
            assert cards[client, label].class_name == name
        federated = FederatedClient(config, session.info.task, 1, partition.shares, np.ones(3))
        training, validation = federated.images("s2")
        told = {int(y): set((images // 40 * 40).flatten().tolist()) for y, images in by_label(training, validation)}
        assert told == {1: {120}, 2: {200}}


def by_label(*sides: Any) -> list[tuple[int, Any]]:
    return [(y, side.images[side.labels == y]) for side in sides for y in side.labels.unique()]


def test_no_silo_is_opened_before_the_names_are_agreed_on(tmp_path: Path) -> None:
    config = natural(tmp_path)
    with pytest.raises(ValueError, match=r"s2.*with_class_names"):
        ClientSlot(config, 1).source("s2")
    source = ClientSlot(config.with_class_names(list(SHADES)), 1).source("s2")
    assert source.labels("train").tolist() == [1] * 3 + [2] * 5


def test_names_number_a_file_too_and_those_of_a_known_set_cannot_be_others(stripes: Path) -> None:
    source = open_source(DataConfig(source=str(stripes), class_names=("a", "b", "c")))
    assert source.class_names == ["a", "b", "c"]
    with pytest.raises(DataInvalidError, match=r"data.class_names.*one, two[\s\S]*'0', '1'"):
        open_source(DataConfig(class_names=("one", "two")))
    with pytest.raises(ValueError, match="class_names"):
        DataConfig(class_names=("a", "a"))


# Modules as files


def export(folder: Path, client: str, source: str, names: tuple[str, ...] | None = None) -> None:
    config = Config.model_validate({"data": {"source": source, "class_names": names}, "generator": TINY})
    export_modules(config, client, str(folder / "exchange"), OUT, device="cpu")


def gathered(folder: Path, source: str, **changes: Any) -> Config:
    return Config.model_validate(
        {"data": {"source": source}, "generator": TINY, "modules": str(folder / "exchange")} | changes
    )


def refused(cluster_survey: Callable[[], Any]) -> str:
    with pytest.raises((ModuleRefusedError, DataInvalidError)) as error:
        cluster_survey()
    return str(error.value)


def test_a_folder_with_one_class_is_told_to_name_them_all(tmp_path: Path) -> None:
    source = write_shades(tmp_path / "a", {"square": 3})
    with pytest.raises(DataInvalidError, match=r"one class, square[\s\S]*--class-names"):
        export(tmp_path, "a", source)
    assert not (tmp_path / "exchange").exists()


def test_a_module_is_never_used_as_one_of_another_class(cluster: None, tmp_path: Path) -> None:
    test = write_shades(tmp_path / "test", dict.fromkeys(SHADES, 2), "test")
    export(tmp_path, "a", write_shades(tmp_path / "a", {"square": 3, "star": 3}))  # square is class 0 here
    message = refused(lambda: survey(gathered(tmp_path, test)))
    assert "'a', class 0" in message
    assert "'square'" in message
    assert "'circle'" in message
    assert "--class-names circle square star" in message
    # The same command with the names: the modules are of other classes, in folders of these.
    export(tmp_path, "b", str(tmp_path / "a"), tuple(SHADES))
    exchange = Storage(str(tmp_path / "exchange"))
    exchange.delete_folder("modules/a")
    assert [(card.label, card.class_name) for card in read_cards(exchange)] == [(1, "square"), (2, "star")]

    # No module of a class: refused by its name, unless somebody was left out.
    assert "no module of class circle" in refused(lambda: survey(gathered(tmp_path, test)))
    _, partition, _ = survey(gathered(tmp_path, test, partition={"exclude": ["b/2"]}))
    assert list(partition.shares["b"]) == [1]

    # A card of an earlier version names no class, and is read.
    export(tmp_path, "c", write_shades(tmp_path / "c", {"circle": 3}), tuple(SHADES))
    card = next(card for card in read_cards(exchange) if card.client == "c")
    keep(exchange, replace(card, class_name=""))
    info, _, cards = survey(gathered(tmp_path, test))
    assert (info.class_names, len(cards)) == (list(SHADES), 3)


def test_names_given_afterwards_go_onto_the_cards_of_modules_that_stay(tmp_path: Path) -> None:
    source = write_shades(tmp_path / "a", {"circle": 3, "square": 3})
    export(tmp_path, "a", source)
    exchange = Storage(str(tmp_path / "exchange"))
    before = read_cards(exchange)
    for name in ("circle", "square"):
        (tmp_path / "a" / "train" / name).rename(tmp_path / "a" / "train" / name.upper())
    export(tmp_path, "a", source)
    after = read_cards(exchange)
    assert [card.class_name for card in after] == ["CIRCLE", "SQUARE"]
    assert [replace(card, class_name="") for card in after] == [replace(card, class_name="") for card in before]


def test_the_names_are_facts_of_the_data_alone() -> None:
    info = DataInfo(["a", "b"], 8, 1, {})
    config = Config().with_class_names(info.class_names)
    assert config.data.class_names == ("a", "b")
    assert config.determining() == Config().determining()
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_names_that_repeat_are_refused_at_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["--client", "a", "--data", "digits", "--out", "exchange", "--class-names", "one", "one"]
    monkeypatch.setattr(sys, "argv", ["train_client.py", *asked])
    with pytest.raises(ConfigError, match="--class-names"):
        train_client.main()
