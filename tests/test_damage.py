"""Damage: a file of a run that is empty, half or garbage is told by its path, and made again where it can be."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fedfactory_ray.classification import training
from fedfactory_ray.classification.card import Classifier
from fedfactory_ray.errors import FedFactoryError, StorageError
from fedfactory_ray.pipeline.session import Session, claim, refuse_forgotten
from fedfactory_ray.settings.command_line import make_config, stored_config
from fedfactory_ray.storage import files
from fedfactory_ray.storage.artefact import DAMAGED, look
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.tuning.record import read_record
from fedfactory_ray.unlearning.facts import read_facts

DAMAGES = {"empty": b"", "half": b'{"a": [1, ', "garbage": b"\xff\x00\x93", "deep": b"[" * 100_000, "other": b"7"}
RUN = Path(__file__).parent / "format-0" / "run"
READ = ("manifest.json", "evaluation.json", "partition.json", "seconds.json")
CARDS = ("modules/client-000/class-000/card.json", "experts/client-001/card.json", "classifier/fedfactory/card.json")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path)).within("run")


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_can_be_made_again_is_told_by_its_path_and_made(
    storage: Storage, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("seconds.json", "trial.json"):
        storage.write(name, DAMAGES[damage])
    nothing: Any = None
    session = Session(
        make_config(), "run", Console(file=io.StringIO()), nothing, nothing, nothing, storage, nothing
    )  # fmt: skip
    assert session.worked == {}
    with session.phase("modules"):
        pass
    assert set(session.worked) == {"modules"}
    assert read_record(storage, {"a": "1"}).reports == []
    assert [f"{storage.uri}/{name} is made anew" in caplog.text for name in ("seconds.json", "trial.json")] == [
        True
    ] * 2


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_claim_is_refused_with_what_to_do(storage: Storage, damage: str) -> None:
    storage.write("config.json", DAMAGES[damage])
    with pytest.raises(StorageError, match=r"run/config\.json[\s\S]*it deleted, so that the same command"):
        claim({"seed": 1}, storage)
    storage.delete("config.json")
    claim({"seed": 1}, storage)
    assert storage.read_json("config.json") == {"seed": 1}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("note", ["forgotten.json", "forgetting.json"])
def test_a_damaged_note_of_a_request_is_refused_by_its_path(storage: Storage, note: str, damage: str) -> None:
    storage.write(note, DAMAGES[damage])
    with pytest.raises(StorageError, match=note):
        refuse_forgotten(storage)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_card_counts_as_missing(storage: Storage, damage: str) -> None:
    storage.write("classifier/a/card.json", DAMAGES[damage])
    assert look(storage, Classifier, "classifier/a", "f00d").why == DAMAGED


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*READ, *CARDS])
def test_records_of_a_finished_run_are_refused_by_their_path(tmp_path: Path, name: str, damage: str) -> None:
    shutil.copytree(RUN, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(DAMAGES[damage])
    if (name, damage) == ("seconds.json", "other"):
        return  # JSON that nobody adds up here
    with pytest.raises(FedFactoryError) as refusal:
        read_facts(Storage(str(tmp_path / "run")))
    told = name if damage != "other" or name in CARDS else str(tmp_path / "run")
    assert told in str(refusal.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_settings_of_a_run_are_a_refusal(storage: Storage, damage: str) -> None:
    storage.write("settings.json", DAMAGES[damage])
    with pytest.raises(FedFactoryError, match=r"settings\.json"):
        stored_config("run", ["--storage.uri", storage.parent.uri])


def test_a_file_has_its_name_only_when_its_bytes_are_on_the_disk(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def sync(path: str) -> None:
        synced.append((Path(path).read_bytes(), storage.exists("a/b.bin"), storage.exists("a/c.bin")))

    monkeypatch.setattr(files, "_sync", sync)
    storage.write("a/b.bin", b"whole")
    storage.create("a/c.bin", b"created")
    storage.within("copy").copy(storage, "a/b.bin")
    assert synced == [(b"whole", False, False), (b"created", True, False), (b"whole", True, True)]


def test_folders_of_fits_that_were_given_up_go_with_the_fit_that_was_not(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, others = [f"train-one-{k * 16}/x" for k in "0a"], ["train-one-two-0000000000000000/x", "train-one/x"]
    for name in (*ours, *others):
        storage.write(name, b"")
    found: Any = SimpleNamespace()
    monkeypatch.setattr(training, "find_all", lambda *_: {"classifier/one": found})
    rows: Any = SimpleNamespace(n_images=1, digest="f00d")
    task: Any = SimpleNamespace(image_shape=(8, 8, 1))
    nothing: Any = None
    assert training.fit(make_config(), rows, task, nothing, storage, "one", nothing) is found
    assert storage.names("") == sorted(others)
