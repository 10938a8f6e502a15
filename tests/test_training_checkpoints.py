"""A module's training that is interrupted goes on to the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedfactory_ray.federation import client
from fedfactory_ray.federation.client import train_share
from fedfactory_ray.generation import canary as canaries
from fedfactory_ray.generation import module
from fedfactory_ray.generation.training import Snapshot, Training, train_denoiser
from fedfactory_ray.generation.unet import Denoiser
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.sections import GeneratorConfig
from fedfactory_ray.storage.files import Storage

CPU = torch.device("cpu")
CONFIG = GeneratorConfig(
    channels=(8,), min_steps=12, max_steps=12, batch_size=4, dropout=0.2, augment="dihedral", precision="fp32"
)


def images(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (9, 8, 8, 1), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def train(**arguments: Any) -> tuple[bytes, list[bytes]]:
    checkpoints = []
    for event in train_denoiser(images(), CONFIG, CPU, 7, **arguments):
        if isinstance(event, Snapshot):
            checkpoints.append(event.content)
        elif isinstance(event, Denoiser):
            return module.pack(event, half=False), checkpoints
    raise AssertionError("no module came")


@pytest.fixture(scope="module")
def undisturbed() -> bytes:
    return train()[0]


def test_every_checkpoint_leads_to_the_same_bytes(undisturbed: bytes) -> None:
    weights, checkpoints = train(checkpoint_seconds=0.0)
    assert weights == undisturbed
    assert len(checkpoints) == 11
    torch.manual_seed(99)  # whatever the new process did before
    for checkpoint in (checkpoints[0], checkpoints[6], checkpoints[-1]):
        assert train(checkpoint=checkpoint)[0] == undisturbed


def test_a_resumed_training_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    _, checkpoints = train(checkpoint_seconds=0.0)
    steps = []
    descend = Training.descend
    monkeypatch.setattr(Training, "descend", lambda self: steps.append(self.step) or descend(self))
    train(checkpoint=checkpoints[8])
    assert steps == [9, 10, 11]


def share(storage: Storage, config: Config, source: Any, seconds: float = 60.0) -> Iterator[Any]:
    """A client's training of its class 0, with a checkpoint every so many seconds."""
    config = config.model_copy(update={"storage": config.storage.model_copy(update={"checkpoint_seconds": seconds})})
    return train_share(config, source, "client-000", {0: np.arange(9)}, CPU, storage)


class Pictures:
    """A source of images(seed)."""

    class_names = ("a", "b", "c", "d")

    def __init__(self, seed: int = 0) -> None:
        self.pixels = images(seed).numpy()

    def images(self, split: str, indices: np.ndarray) -> np.ndarray:
        return self.pixels[indices]


@pytest.mark.parametrize("change", ["nothing", "another machine", "torn", "other images", "another seed"])
def test_a_client_goes_on_from_its_own_whole_checkpoint_alone(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, config = Storage(str(tmp_path)), Config(generator=CONFIG)
    broken = share(storage, config, Pictures(), seconds=1e-9)
    next(event for event in broken if storage.names("modules"))
    broken.close()
    (file,) = [name for name in storage.names("modules") if name.endswith(".safetensors")]
    if change == "torn":
        storage.write(file, storage.read(file)[:5000])
    here = canaries.canary(CPU, "fp32")
    if change == "another machine":
        monkeypatch.setattr(canaries, "canary", lambda device, precision: "f00d")
    source = Pictures(1 if change == "other images" else 0)
    if change == "another seed":
        config = config.model_copy(update={"seed": 5})
    first, *_, (card, weights, _) = share(storage, config, source)
    assert first.resumed == (change in ("nothing", "another machine"))
    assert card.canary == (canaries.joined(here, "f00d") if change == "another machine" else here)
    assert storage.names("modules") == [f"{card.folder}/card.json", f"{card.folder}/model.safetensors"]
    *_, (_, undisturbed, _) = share(Storage(str(tmp_path / "undisturbed")), config, source)
    assert weights == undisturbed
    # What is there and whole is not trained again.
    assert [event[:2] for event in share(storage, config, source)] == [(card, weights)]


def test_modules_that_train_side_by_side_have_the_bytes_of_those_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(generator=CONFIG.model_copy(update={"dropout": 0.0}))
    share = {label: np.arange(label, 9) for label in range(4)}

    descend, turns = Training.descend, []
    monkeypatch.setattr(Training, "descend", lambda self: turns.append(self) or descend(self))

    def trained(at_once: int) -> dict[int, bytes]:
        turns.clear()
        events = train_share(config, Pictures(), "a", share, CPU, Storage(str(tmp_path / str(at_once))), at_once)
        modules = {event[0].label: event[1] for event in events if isinstance(event, tuple)}
        assert len(set(turns[:3])) == at_once
        return modules

    alone = trained(1)
    assert len(alone) == 4
    assert trained(3) == alone


def test_modules_that_share_random_numbers_do_not_train_side_by_side() -> None:
    assert client.modules_at_once(CONFIG.model_copy(update={"dropout": 0.0})) > 1
    assert client.modules_at_once(CONFIG) == 1


def test_a_checkpoint_that_cannot_be_written_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(client.Checkpoints, "save", full)
    with pytest.raises(OSError, match="no space left"):
        list(share(Storage(str(tmp_path)), Config(generator=CONFIG), Pictures(), seconds=1e-9))
