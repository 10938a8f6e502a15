"""Fitting a classifier with Ray Train, on any number of workers."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from queue import Empty
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.util.queue import Queue

from fedfactory_ray.classification.batches import Batches, HeldBatches, StreamedBatches
from fedfactory_ray.classification.card import Classifier, Epoch
from fedfactory_ray.classification.rows import Rows
from fedfactory_ray.classification.sides import keep_side
from fedfactory_ray.cluster.failures import failures_refused, find_refusal
from fedfactory_ray.cluster.plan import Worker
from fedfactory_ray.cluster.stored import find_all
from fedfactory_ray.data.readers import open_source
from fedfactory_ray.data.source import Task
from fedfactory_ray.errors import ConfigError
from fedfactory_ray.seeds import derive_seed
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.artefact import fingerprint, keep
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import PROGRESS, WEIGHTS, classifier_folder, trainer_folder
from fedfactory_ray.synthesis.shard import image_table

log = logging.getLogger(__name__)
POLL_SECONDS = "0.5"
"""How often Ray Train's controller looks after its workers; by default every 2 s, for which short fits would wait."""


def fit(
    config: Config,
    rows: Rows,
    task: Task,
    worker: Worker,
    storage: Storage,
    name: str,
    listen: Callable[[Epoch], None],
    *,
    judged: bool = False,
) -> Classifier:
    """Fit the configured classifier on `rows` and keep it in storage under classifier/`name`.

    A classifier that is there already, fitted on rows of the same digest with the same recipe, is not fitted again;
    a fit that broke off goes on from its last checkpoint. The best epoch by validation loss is kept. Where the fit is
    `judged`, every epoch also tells of the real validation split.
    """
    held = config.resources.holds(rows.n_images, task.image_shape)
    refuse_few_rows(config, rows.n_images, held=held)
    made_of = fit_fingerprint(config, rows.digest, held=held)
    checkpoints = trainer_folder(name, made_of)
    found = find_all(storage, Classifier, {classifier_folder(name): made_of}).get(classifier_folder(name))
    if found is None:
        result = _train(config, rows, task, worker, storage, name, checkpoints, listen, held=held, judged=judged)
        found = _keep(config, storage, name, made_of, rows, task, result.checkpoint)
    # Those of a start that was killed at its very end, too, and of a fit with other settings that was given up.
    for folder in filter(re.compile(trainer_folder(re.escape(name), "[0-9a-f]{16}")).fullmatch, storage.entries("")):
        storage.delete_folder(folder)
    return found


def refuse_few_rows(config: Config, n_images: int, *, held: bool) -> None:
    """Raise ConfigError where a worker would have no batch: rows held in memory make a smaller one, of a row a worker
    at least; streamed rows make whole batches alone."""
    training, workers = int(n_images * (1 - config.classifier.validation_fraction)), config.resources.classifier_workers
    needed = workers if held else config.classifier.batch_size
    if training < needed and (workers > 1 or not held):
        raise ConfigError(
            [
                f"resources.classifier_workers={workers}: found {training} images to train on, needed {needed}: use "
                "fewer workers, a smaller classifier.batch_size or more images"
            ]
        )


def fit_fingerprint(config: Config, rows_digest: str, *, held: bool) -> str:
    """What determines a classifier: its rows and how they are read, the recipe, and the workers that share a batch."""
    recipe, resources = config.classifier.model_dump(mode="json"), config.resources
    workers = [resources.classifier_workers, resources.classifier.threads]
    return fingerprint(Classifier.kind, rows_digest, held, recipe, workers, config.seed)


def _train(
    config: Config,
    rows: Rows,
    task: Task,
    worker: Worker,
    storage: Storage,
    name: str,
    folder: str,
    listen: Callable[[Epoch], None],
    *,
    held: bool,
    judged: bool,
) -> ray.train.Result:
    """Run the fit `name` with Ray Train, which keeps checkpoints in `folder` and goes on from the last one there."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_SECONDS)
    queue = Queue(actor_options={"num_cpus": 0})
    batches = int(rows.n_images * (1 - config.classifier.validation_fraction)) // config.classifier.batch_size
    datasets = {} if held else _streams(config, rows)
    trainer = ray.train.torch.TorchTrainer(
        _fit_on_worker,
        train_loop_config={
            "config": config,
            "task": task,
            "threads": worker.threads,
            "gpu": worker.num_gpus > 0,
            "table": rows.table if held else None,
            "unit_size": rows.unit_size,
            "steps": max(1, batches),
            "queue": queue,
            "judged": judged,
            "name": name,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.resources.classifier_workers,
            use_gpu=worker.num_gpus > 0,
            resources_per_worker={"CPU": worker.num_cpus} | ({"GPU": worker.num_gpus} if worker.num_gpus else {}),
        ),
        run_config=ray.train.RunConfig(
            name=folder,
            storage_path=storage.root,
            storage_filesystem=storage.filesystem,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            failure_config=ray.train.FailureConfig(max_failures=config.resources.attempts - 1),
            callbacks=[RefusalsEnd()],
        ),
        datasets=datasets,
        dataset_config=ray.train.DataConfig(datasets_to_split=["train"]) if datasets else None,
    )
    with _relay(queue, listen):
        try:
            return trainer.fit()
        except ray.train.TrainingFailedError as error:
            refusal = find_refusal(error)
            if refusal is None:
                raise
            raise refusal from None


class RefusalsEnd(ray.train.UserCallback):
    """Ends a fit with the refusal of a worker, which would come again each time that Ray Train tried anew."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """See UserCallback; what it raises, Ray Train does not retry."""
        for refusal in filter(None, map(find_refusal, worker_exceptions.values())):
            raise refusal


def _streams(config: Config, rows: Rows) -> dict[str, ray.data.Dataset]:
    """The rows as data sets, those that train and those that validate."""
    dataset, fraction = rows.dataset(), config.classifier.validation_fraction
    return {
        name: dataset.map_batches(
            keep_side,
            fn_kwargs={"unit_size": rows.unit_size, "fraction": fraction, "validation": side},
            batch_format="pyarrow",
        )
        for name, side in {"train": False, "validation": True}.items()
    }


def _keep(
    config: Config, storage: Storage, name: str, made_of: str, rows: Rows, task: Task, checkpoint: Any
) -> Classifier:
    """Keep the best weights of a finished fit's last checkpoint, and say what they are."""
    progress = json.loads(_read(checkpoint, PROGRESS))
    weights = storage.write(f"{classifier_folder(name)}/{WEIGHTS}", _read(checkpoint, WEIGHTS))
    classifier = Classifier(
        name=name,
        rows=rows.digest,
        epoch=progress["best"]["epoch"],
        validation_accuracy=progress["best"]["validation_accuracy"],
        history=[Epoch(**epoch) for epoch in progress["history"]],
        task=task,
        model=config.classifier.model,
        fingerprint=made_of,
        files={WEIGHTS: weights},
    )
    keep(storage, classifier)
    return classifier


def _read(checkpoint: Any, name: str) -> bytes:
    with checkpoint.filesystem.open_input_stream(f"{checkpoint.path}/{name}") as stream:
        return bytes(stream.read())


@contextlib.contextmanager
def _relay(queue: Queue, listen: Callable[[Epoch], None]) -> Iterator[None]:
    """Hand the workers' epochs to `listen` while the block runs."""
    done = threading.Event()

    def relay() -> None:
        expected = 1
        while True:
            try:
                epoch = Epoch(**queue.get(timeout=0.5))
                if epoch.epoch != expected:
                    log.info("the fit goes on from epoch %d of %d", epoch.epoch - 1, epoch.epochs)
                expected = epoch.epoch + 1
                listen(epoch)
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
    remedy = "a smaller classifier.batch_size, more resources.classifier_workers, or resources.classifier.num_gpus=1"
    with failures_refused(f"the fit of {settings['name']}", remedy):
        _fit_epochs(settings)


def _fit_epochs(settings: dict[str, Any]) -> None:
    import torch

    from fedfactory_ray.classification.fitting import Fit
    from fedfactory_ray.cluster.devices import prepare_process

    config: Config = settings["config"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    # Workers on one node see each other's GPUs, so Ray Train has to tell which one is whose.
    chosen = ray.train.torch.get_device() if settings["gpu"] else torch.device("cpu")
    device = prepare_process(settings["threads"], chosen)
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
            fit.load({path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()})
    for epoch in fit.epochs(training, validation, real):
        if rank == 0:
            settings["queue"].put(asdict(epoch))  # plain values, or the queue's process would import torch
        # A report waits until the controller polls: only checkpoints are worth that.
        if epoch.epoch % config.storage.checkpoint_epochs and epoch.epoch != epoch.epochs:
            continue
        if rank == 0:
            with tempfile.TemporaryDirectory() as folder:
                for name, content in fit.save().items():
                    Path(folder, name).write_bytes(content)
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
        sides = (keep_side(table, settings["unit_size"], fraction, validation=side) for side in (False, True))
        training, validation = (HeldBatches(side, shape, size, seed, rank, world) for side in sides)
        return training, validation
    return (
        StreamedBatches(ray.train.get_dataset_shard("train"), shape, size // world, seed, settings["steps"]),
        StreamedBatches(ray.train.get_dataset_shard("validation"), shape, size, seed, settings["steps"]),
    )


def _real_batches(config: Config, task: Task, rank: int, world: int) -> Batches:
    """The real validation split, every worker its part."""
    source = open_source(config.data)
    table = image_table(source.images("val"), source.labels("val"), "real")
    return HeldBatches(table, task.image_shape, config.classifier.batch_size, 0, rank, world)
