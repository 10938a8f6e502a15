"""A module's training that is interrupted goes on to the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedfactory_ray.generation import module
from fedfactory_ray.generation.training import Training, train_denoiser
from fedfactory_ray.generation.unet import Denoiser
from fedfactory_ray.settings.sections import GeneratorConfig

CPU = torch.device("cpu")
CONFIG = GeneratorConfig(
    channels=(8,), min_steps=12, max_steps=12, batch_size=4, dropout=0.2, augment="dihedral", precision="fp32"
)


def images(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (9, 8, 8, 1), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def train(**arguments: Any) -> tuple[bytes, list[bytes]]:
    checkpoints = []
    for event in train_denoiser(images(), CONFIG, CPU, 7, **arguments):
        if isinstance(event, bytes):
            checkpoints.append(event)
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


def first_checkpoint(pictures: torch.Tensor, seed: int) -> bytes:
    events = train_denoiser(pictures, CONFIG, CPU, seed, None, 0.0)
    return next(event for event in events if isinstance(event, bytes))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: first_checkpoint(images(), 7)[:5000], id="torn"),
        pytest.param(lambda: b"", id="empty"),
        pytest.param(lambda: first_checkpoint(images(1), 7), id="other images"),
        pytest.param(lambda: first_checkpoint(images(), 8), id="another seed"),
    ],
)
def test_a_torn_or_strange_checkpoint_is_left_aside(make: Callable[[], bytes], undisturbed: bytes) -> None:
    assert train(checkpoint=make())[0] == undisturbed
