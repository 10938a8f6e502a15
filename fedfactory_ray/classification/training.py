"""Fitting a classifier on the cluster: what determines it, and how it is fitted where it is not there yet."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial

from fedfactory_ray.classification.alone import fit_alone
from fedfactory_ray.classification.card import Classifier, Epoch
from fedfactory_ray.classification.loop import Loop
from fedfactory_ray.classification.rows import Rows
from fedfactory_ray.classification.together import fit_together
from fedfactory_ray.cluster.plan import Worker
from fedfactory_ray.cluster.stored import find_all
from fedfactory_ray.data.source import Task
from fedfactory_ray.errors import ConfigError
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.artefact import fingerprint, keep
from fedfactory_ray.storage.checkpoints import Checkpoints
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import PROGRESS, WEIGHTS, checkpoints_folder, classifier_folder, trainer_folder


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
    folder = trainer_folder(name, made_of)
    checkpoints = Checkpoints(storage, checkpoints_folder(classifier_folder(name)), made_of)
    found = find_all(storage, Classifier, {classifier_folder(name): made_of}).get(classifier_folder(name))
    if found is None:
        batches = int(rows.n_images * (1 - config.classifier.validation_fraction)) // config.classifier.batch_size
        loop = Loop(
            name=name,
            config=config,
            task=task,
            steps=max(1, batches),
            threads=worker.threads,
            gpu=worker.num_gpus > 0,
            table=rows.table if held else None,
            unit_size=rows.unit_size,
            judged=judged,
        )
        if held and config.resources.classifier_workers == 1:
            fit_alone(loop, worker, checkpoints, listen)
            newest = checkpoints.newest()
            assert newest is not None, "the last epoch makes one"
            read: Callable[[str], bytes] = partial(checkpoints.read, newest)
        else:
            read = fit_together(loop, rows, worker, storage, folder, listen)
        found = _keep(config, storage, name, made_of, rows, task, read)
    checkpoints.delete()
    # Those of a start that was killed at its very end, too, and of a fit with other settings that was given up.
    for left in filter(re.compile(trainer_folder(re.escape(name), "[0-9a-f]{16}")).fullmatch, storage.entries("")):
        storage.delete_folder(left)
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


def _keep(
    config: Config, storage: Storage, name: str, made_of: str, rows: Rows, task: Task, read: Callable[[str], bytes]
) -> Classifier:
    """Keep the best weights of a finished fit's last checkpoint, and say what they are."""
    progress = json.loads(read(PROGRESS))
    weights = storage.write(f"{classifier_folder(name)}/{WEIGHTS}", read(WEIGHTS))
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
