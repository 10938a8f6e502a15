"""Fitting a classifier with Ray Train, on any number of workers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from queue import Empty
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.util.queue import Queue

from fedfactory_ray.classification.batches import Batches, HeldBatches, StreamedBatches, keep_side
from fedfactory_ray.classification.card import verified_card
from fedfactory_ray.classification.fitting import Epoch
from fedfactory_ray.classification.rows import Rows
from fedfactory_ray.cluster.plan import Worker
from fedfactory_ray.data.source import Task
from fedfactory_ray.seeds import derive_seed
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import WEIGHTS

POLL_SECONDS = "0.5"
"""How often Ray Train's controller looks after its workers; by default every 2 s, for which short fits would wait."""


@dataclass(frozen=True)
class Classifier:
    """A fitted classifier in storage: `<folder>/model.safetensors`."""

    folder: str
    sha256: str
    epoch: int
    validation_accuracy: float
    history: list[Epoch]


def fit(
    config: Config,
    rows: Rows,
    task: Task,
    worker: Worker,
    storage: Storage,
    name: str,
    listen: Callable[[Epoch], None],
    judged: bool = False,
) -> Classifier:
    """Fit the configured classifier on `rows` and keep it in storage under classifier/`name`.

    A classifier that is there already, fitted on rows of the same digest with the same recipe, is not fitted again;
    a fit that broke off goes on from its last checkpoint. The best epoch by validation loss is kept. Where the fit is
    `judged`, every epoch also tells of the real validation split.
    """
    folder = f"classifier/{name}"
    fingerprint = fit_fingerprint(config, rows.digest)
    stored = _stored(storage, folder, fingerprint)
    trainer_folder = f"train-{name}-{fingerprint[:16]}"
    if stored is not None:
        storage.delete_folder(trainer_folder)  # of a start that was killed at its very end
        return stored
    fraction = config.classifier.validation_fraction
    held = rows.images * task.channels * task.resolution**2 <= config.classifier.in_memory_mb * 2**20
    datasets: dict[str, ray.data.Dataset] = {}
    if not held:
        sides, dataset = {"train": False, "validation": True}, rows.dataset()
        datasets = {
            name: dataset.map_batches(
                keep_side,
                fn_kwargs={"unit_size": rows.unit_size, "fraction": fraction, "validation": side},
                batch_format="pyarrow",
            )
            for name, side in sides.items()
        }
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_SECONDS)
    queue = Queue(actor_options={"num_cpus": 0})
    settings = {
        "config": config,
        "task": task,
        "resources": worker.resources,
        "table": rows.table if held else None,
        "unit_size": rows.unit_size,
        "steps": max(1, int(rows.images * (1 - fraction)) // config.classifier.batch_size),
        "queue": queue,
        "judged": judged,
    }
    trainer = ray.train.torch.TorchTrainer(
        _fit_on_worker,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.resources.classifier_workers,
            use_gpu=worker.num_gpus > 0,
            resources_per_worker={"CPU": worker.num_cpus} | ({"GPU": worker.num_gpus} if worker.num_gpus else {}),
        ),
        run_config=ray.train.RunConfig(
            name=trainer_folder,
            storage_path=storage.root,
            storage_filesystem=storage.filesystem,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            failure_config=ray.train.FailureConfig(max_failures=2),
        ),
        datasets=datasets,
        dataset_config=ray.train.DataConfig(datasets_to_split=["train"]) if datasets else None,
    )
    with _relay(queue, listen):
        checkpoint = trainer.fit().checkpoint
    state = json.loads(_read(checkpoint, "fit.json"))
    storage.write(f"{folder}/{WEIGHTS}", _read(checkpoint, WEIGHTS))
    card = {
        "fingerprint": fingerprint,
        "rows": rows.digest,
        "sha256": storage.sha256(f"{folder}/{WEIGHTS}"),
        "epoch": state["best"]["epoch"],
        "validation_accuracy": state["best"]["validation_accuracy"],
        "history": state["history"],
        "task": asdict(task),
        "model": config.classifier.model,
    }
    storage.write_json(f"{folder}/card.json", card)
    storage.delete_folder(trainer_folder)
    fitted = _stored(storage, folder, fingerprint)
    if fitted is None:
        raise RuntimeError(f"{storage.uri}/{folder} does not verify right after it was written: check the storage")
    return fitted


def fit_fingerprint(config: Config, rows_digest: str) -> str:
    """SHA-256 of all that determines a classifier."""
    recipe = [
        rows_digest,
        config.classifier.model_dump(mode="json"),
        config.resources.classifier_workers,
        config.seed,
    ]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


def _read(checkpoint: Any, name: str) -> bytes:
    with checkpoint.filesystem.open_input_stream(f"{checkpoint.path}/{name}") as stream:
        return bytes(stream.read())


def _stored(storage: Storage, folder: str, fingerprint: str) -> Classifier | None:
    """The classifier in `folder`, if it was made by this recipe from these rows and verifies."""
    card = verified_card(storage, folder, fingerprint)
    if card is None:
        return None
    history = [Epoch(**epoch) for epoch in card["history"]]
    return Classifier(folder, card["sha256"], card["epoch"], card["validation_accuracy"], history)


@contextlib.contextmanager
def _relay(queue: Queue, listen: Callable[[Epoch], None]) -> Iterator[None]:
    """Hand the workers' epochs to `listen` while the block runs."""
    done = threading.Event()

    def relay() -> None:
        while True:
            try:
                listen(Epoch(**queue.get(timeout=0.5)))
            except Empty:
                if done.is_set():
                    return

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        queue.shutdown()


def _fit_on_worker(settings: dict[str, Any]) -> None:
    """The training loop of one Ray Train worker."""
    import torch

    from fedfactory_ray.classification.fitting import Fit
    from fedfactory_ray.cluster.devices import prepare_process

    config: Config = settings["config"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    # Workers on one node see each other's GPUs, so Ray Train has to tell which one is whose.
    chosen = ray.train.torch.get_device() if settings["resources"].num_gpus else torch.device("cpu")
    device = prepare_process(settings["resources"], chosen)
    seed = derive_seed(config.seed, "classifier")
    training, validation = _batches(config, settings, seed, rank, world)
    real = _real_batches(config, settings["task"], rank, world) if settings["judged"] else None
    fit = Fit(
        config.classifier,
        settings["task"],
        settings["steps"],
        seed,
        device,
        rank,
        world,
        lambda network: ray.train.torch.prepare_model(network, move_to_device=False),
    )
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            fit.load(folder)
    for epoch in fit.epochs(training, validation, real):
        if rank == 0:
            settings["queue"].put(asdict(epoch))  # plain values, or the queue's process would import torch
        # A report waits until the controller polls: only checkpoints are worth that.
        if epoch.epoch % config.classifier.checkpoint_every and epoch.epoch != epoch.epochs:
            continue
        if rank == 0:
            with tempfile.TemporaryDirectory() as folder:
                fit.save(folder)
                ray.train.report(asdict(epoch), checkpoint=ray.train.Checkpoint.from_directory(folder))
        else:
            ray.train.report(asdict(epoch))


def _batches(config: Config, settings: dict[str, Any], seed: int, rank: int, world: int) -> tuple[Batches, Batches]:
    """Training and validation batches of a worker: held where the data sets are not split among workers."""
    size, shape, fraction = (
        config.classifier.batch_size,
        settings["task"].image_shape,
        config.classifier.validation_fraction,
    )
    if settings["table"] is not None:
        table = settings["table"]()
        sides = (keep_side(table, settings["unit_size"], fraction, validation) for validation in (False, True))
        training, validation = (HeldBatches(side, shape, size, seed, rank, world) for side in sides)
        return training, validation
    return (
        StreamedBatches(ray.train.get_dataset_shard("train"), shape, size // world, seed, settings["steps"]),
        StreamedBatches(ray.train.get_dataset_shard("validation"), shape, size, seed, settings["steps"]),
    )


def _real_batches(config: Config, task: Task, rank: int, world: int) -> Batches:
    """The real validation split, every worker its part."""
    from fedfactory_ray.data.readers import open_source
    from fedfactory_ray.synthesis.shard import image_table

    source = open_source(config.data)
    table = image_table(source.images("val"), source.labels("val"), "real")
    return HeldBatches(table, task.image_shape, config.classifier.batch_size, 0, rank, world)
