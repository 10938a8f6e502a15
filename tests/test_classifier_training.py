"""Fitting with Ray Train: several workers, streaming, resuming."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pytest
import ray
import torch
from clusters import workers

from fedfactory_ray.classification.batches import HeldBatches
from fedfactory_ray.classification.card import Classifier, Epoch
from fedfactory_ray.classification.fitting import Fit
from fedfactory_ray.classification.rows import Rows
from fedfactory_ray.classification.sides import keep_side
from fedfactory_ray.classification.training import fit, refuse_few_rows
from fedfactory_ray.cluster.plan import make_plan
from fedfactory_ray.data.source import Task
from fedfactory_ray.errors import ConfigError
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.synthesis.shard import image_column

TASK = Task(classes=3, channels=1, resolution=8)


def columns(n: int = 240) -> dict[str, np.ndarray]:
    draw = np.random.RandomState(0)
    labels = np.arange(n) % 3
    images = draw.randint(0, 60, (n, 8, 8, 1)).astype(np.uint8)
    images[np.arange(n), 2 * labels + 1] += 150
    client = np.array(["a", "b"])[np.arange(n) // 3 % 2]
    return {"image": images, "label": labels, "client": client, "unit": np.arange(n) // 60, "index": np.arange(n) % 60}


def table_of(found: dict[str, np.ndarray]) -> pa.Table:
    return pa.table({name: image_column(c) if name == "image" else c for name, c in found.items()})


def make_rows() -> Rows:
    table = table_of(columns())
    return Rows(lambda: table, lambda: ray.data.from_arrow([table.slice(0, 100), table.slice(100)]), "digest", 240, 60)


def config(workers: int, in_memory_mb: int = 64, **classifier: object) -> Config:
    recipe = {"epochs": 4, "batch_size": 16, "shift": 0.0, **classifier}
    resources = {"classifier_workers": workers, "classifier": {"num_cpus": 1 / workers, "threads": 1}}
    resources |= {"in_memory_mb": in_memory_mb}
    storage = {"checkpoint_epochs": 2}
    return Config.model_validate({"classifier": recipe, "resources": resources, "storage": storage})


def fit_here(settings: Config, folder: Path, listen: Callable[[Epoch], None]) -> Classifier:
    worker = make_plan(settings.resources).classifier
    return fit(settings, make_rows(), TASK, worker, Storage(str(folder)), "here", listen)


def kill(title: str) -> None:
    """Kill the one process of this Ray that does this."""
    (worker,) = [each for each in workers(title) if each.is_running()]
    worker.kill()


@pytest.mark.parametrize(("in_memory_mb", "epochs"), [(0, 2), (64, 4)])
def test_two_workers_fit_a_held_classifier_the_same_twice_and_a_streamed_one(
    cluster: None, tmp_path: Path, in_memory_mb: int, epochs: int
) -> None:
    heard: list[Epoch] = []
    settings = config(2, in_memory_mb, epochs=epochs)
    interrupt = signal.getsignal(signal.SIGINT)
    classifier = fit_here(settings, tmp_path, heard.append)
    assert signal.getsignal(signal.SIGINT) is interrupt, "Ctrl-C ends a job after a fit, too"
    assert [epoch.epoch for epoch in heard] == list(range(1, epochs + 1))
    assert classifier.history == heard
    assert classifier.validation_accuracy > 0.9
    assert heard[-1].train_loss < heard[0].train_loss
    best = min(heard, key=lambda epoch: (epoch.validation_loss, -epoch.epoch))
    assert classifier.epoch == best.epoch
    assert Storage(str(tmp_path)).names("") == ["classifier/here/card.json", "classifier/here/model.safetensors"]
    if in_memory_mb:
        again: list[Epoch] = []

        def disturb(epoch: Epoch) -> None:
            if epoch.epoch == len(again) + 1:
                again.append(epoch)
            if epoch.epoch == 2 and not killed:
                killed.append("TrainController")
                kill("TrainController")
            elif epoch.epoch == 3 and len(killed) == 1:
                killed.append("_QueueActor")
                kill("_QueueActor")

        killed: list[str] = []
        assert fit_here(settings, tmp_path / "again", disturb) == classifier
        assert killed == ["TrainController", "_QueueActor"]
        assert again == heard


def test_held_batches_do_not_depend_on_the_order_of_arrival() -> None:
    there = columns()
    order = np.random.RandomState(1).permutation(len(there["label"]))
    shuffled = {name: column[order] for name, column in there.items()}
    one, other = (HeldBatches(table_of(c), TASK.image_shape, 16, 5, 0, 1) for c in (there, shuffled))
    for (images, labels), (images2, labels2) in zip(one.epoch(3), other.epoch(3), strict=True):
        assert (images == images2).all()
        assert (labels == labels2).all()


def test_workers_share_every_batch() -> None:
    whole = HeldBatches(table_of(columns()), TASK.image_shape, 16, 5, 0, 1)
    parts = [HeldBatches(table_of(columns()), TASK.image_shape, 16, 5, rank, 2) for rank in range(2)]
    for (images, _), *shares in zip(whole.epoch(0), *(part.epoch(0) for part in parts), strict=True):
        pixels = sorted(image.numpy().tobytes() for image in images)
        assert pixels == sorted(image.numpy().tobytes() for share, _ in shares for image in share)


def test_what_a_gpu_judges_at_once_does_not_depend_on_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldBatches(table_of(columns()), TASK.image_shape, 16, 5, 0, 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    held.to(torch.device("cuda"))  # no room: the rows stay where they are
    assert [len(labels) for _, labels in held.epoch(None)] == [64, 64, 64, 48]
    assert {len(labels) for _, labels in held.epoch(0)} == {16}


def test_validation_rows_are_a_tenth_and_stay_when_rows_go() -> None:
    there = columns()
    training, validation = (keep_side(table_of(there), 60, 0.1, validation=side) for side in (False, True))
    assert (len(training), len(validation)) == (216, 24)
    without = table_of({name: column[there["client"] != "b"] for name, column in there.items()})
    kept = keep_side(without, 60, 0.1, validation=True)
    assert kept.equals(validation.filter(pa.compute.not_equal(validation["client"], "b")))


def test_a_fit_whose_loss_is_never_finite_is_an_error_also_after_a_break() -> None:
    recipe = Config().classifier.model_copy(update={"learning_rate": 1e30, "epochs": 2})
    batches = HeldBatches(table_of(columns()), TASK.image_shape, 16, 0, 0, 1)
    diverging = Fit(recipe, TASK, 15, 0, torch.device("cpu"))
    with pytest.raises(FloatingPointError, match=r"never finite in 2 epochs[\s\S]*smaller classifier.learning_rate"):
        list(diverging.epochs(batches, batches))
    assert diverging.best is None
    assert len(diverging.history) == 2
    resumed = Fit(recipe, TASK, 15, 0, torch.device("cpu"))
    resumed.load(diverging.save())
    with pytest.raises(FloatingPointError):
        list(resumed.epochs(batches, batches))


@pytest.mark.parametrize(("n", "world", "shares"), [(7, 2, [3, 3]), (10, 3, [3, 3, 3]), (2, 2, [1, 1]), (7, 1, [7])])
def test_workers_have_as_many_rows_each_where_rows_are_fewer_than_a_batch(
    n: int, world: int, shares: list[int]
) -> None:
    few = table_of(columns()).slice(0, n)
    parts = [HeldBatches(few, TASK.image_shape, 16, 5, rank, world) for rank in range(world)]
    assert [len(labels) for part in parts for _, labels in part.epoch(0)] == shares
    assert sum(len(labels) for part in parts for _, labels in part.epoch(None)) == n


def test_a_worker_without_a_row_is_refused() -> None:
    refuse_few_rows(config(2), 3, held=True)
    with pytest.raises(ConfigError, match="classifier_workers=2: found 1 images to train on, needed 2"):
        refuse_few_rows(config(2), 2, held=True)
    with pytest.raises(ConfigError, match="found 13 images to train on, needed 16"):
        refuse_few_rows(config(1), 15, held=False)
