"""A client's expert: a classifier of all classes, from its own real images and the pool of synthetic ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import safetensors.torch

from fedfactory_ray.classification.batches import BalancedBatches, Group
from fedfactory_ray.classification.card import Epoch, Expert
from fedfactory_ray.classification.fitting import Fit
from fedfactory_ray.classification.sides import keep_side, validates
from fedfactory_ray.data.partition import Partition, own_indices
from fedfactory_ray.data.source import Source, Task
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.seeds import derive_seed
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.artefact import fingerprint, keep
from fedfactory_ray.storage.checkpoints import Checkpoints
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import WEIGHTS, checkpoints_folder, expert_folder
from fedfactory_ray.synthesis.shard import Shard, images_of, read_shards

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Assignment:
    """What a client needs to fit its expert: its share, and of every class that it has not enough of, the pool's
    shards and the bytes of the other clients' modules. `images_sha256` are fingerprints of its images by class."""

    client: str
    share: dict[int, np.ndarray]
    shards: tuple[Shard, ...]
    downlink_bytes: int
    task: Task
    images_sha256: dict[int, str | None] = field(default_factory=dict)

    def needed(self, config: Config) -> set[int]:
        """The classes of which the client holds too few."""
        return {y for y in range(self.task.classes) if real_share(config, len(self.share.get(y, ()))) < 1}

    def fingerprint(self, config: Config) -> str:
        """What determines the expert."""
        return fingerprint(
            Expert.kind,
            self.client,
            [[label, indices, self.images_sha256.get(label)] for label, indices in self.share.items()],
            [shard.rows_sha256 for shard in self.shards],
            config.classifier.model_dump(mode="json"),
            config.experts.model_dump(mode="json"),
            config.synthesis.images_per_class,
            config.resources.client.threads,
            config.seed,
        )


def assign(
    config: Config, client: str, partition: Partition, manifest: list[Shard], cards: list[ModuleCard], task: Task
) -> Assignment:
    """What `client` gets: synthetic images of each class of which it holds fewer than the quota.

    The pool is drawn once and read by all. A client that draws by itself needs the other clients' modules of these
    classes instead and gets the same bytes, so these are what is counted as its downlink.
    """
    share = partition.shares[client]
    bare = Assignment(client, share, (), 0, task, {y: partition.images_sha256.get((client, y)) for y in share})
    needed = bare.needed(config)
    modules = [card for card in cards if card.client != client and card.label in needed]
    return replace(
        bare,
        shards=tuple(shard for shard in manifest if shard.label in needed),
        downlink_bytes=sum(card.upload_bytes for card in modules),
    )


def real_share(config: Config, n_images: int) -> float:
    """Fraction of a class's images in an epoch that are real, for a client holding `n_images` of them."""
    return min(n_images / config.synthesis.images_per_class, config.experts.real_share)


def make_batches(
    config: Config, assignment: Assignment, source: Source, storage: Storage
) -> tuple[BalancedBatches, BalancedBatches]:
    """Training and validation batches, in which all classes are alike in number and real images have `real_share`.

    Every (1 / validation_fraction)-th image by place validates, of the client's own as of the pool's.
    """
    fraction, shape = config.classifier.validation_fraction, assignment.task.image_shape
    quota = config.synthesis.images_per_class
    indices = [own_indices(config, source, label, places) for label, places in assignment.share.items()]
    held = np.split(source.images("train", np.concatenate(indices)), np.cumsum([len(i) for i in indices])[:-1])
    real = dict(zip(assignment.share, held, strict=True))
    sides: tuple[list[Group], list[Group]] = ([], [])
    for y in range(assignment.task.classes):
        own = real.get(y, np.empty((0, *shape), np.uint8))
        judged = validates(np.arange(len(own)), fraction)
        pool = read_shards(storage, [shard.file for shard in assignment.shards if shard.label == y])
        for side, groups in zip((False, True), sides, strict=True):
            drawn = keep_side(pool, config.synthesis.unit_size, fraction, validation=side)
            shown = round(quota * (fraction if side else 1 - fraction))
            groups += compose(y, own[judged == side], images_of(drawn, shape), shown, real_share(config, len(own)))
    seed = derive_seed(config.seed, "expert", assignment.client)
    training, validation = (BalancedBatches(groups, config.classifier.batch_size, seed) for groups in sides)
    return training, validation


def compose(label: int, real: np.ndarray, drawn: np.ndarray, shown: int, share: float) -> list[Group]:
    """`shown` images of a class an epoch, the given share of them real; all of one kind where there is no other."""
    if not len(drawn):
        share = 1.0
    if not len(real):
        share = 0.0
    groups = [Group(label, real, round(shown * share)), Group(label, drawn, shown - round(shown * share))]
    return [group for group in groups if len(group.images) and group.shown]


def fit_expert(
    config: Config,
    assignment: Assignment,
    source: Source,
    storage: Storage,
    device: torch.device,
    scratch: Storage | None = None,
) -> Iterator[Epoch | Expert]:
    """Fit a client's expert where its images are: its epochs, and at the end the expert, which is in storage then.

    It is the central classifier's recipe and code. A fit that broke off goes on from its last checkpoint,
    which lies in `scratch`, by default in `storage` too.
    """
    made_of, folder = assignment.fingerprint(config), expert_folder(assignment.client)
    training, validation = make_batches(config, assignment, source, storage)
    fit = Fit(config.classifier, assignment.task, training.steps, training.seed, device)
    checkpoints = Checkpoints(scratch or storage, checkpoints_folder(folder), made_of)
    newest = checkpoints.newest()
    if newest is not None:
        fit.load({name: checkpoints.read(newest, name) for name in newest.files})
    for epoch in fit.epochs(training, validation):
        if epoch.epoch % config.storage.checkpoint_epochs == 0 or epoch.epoch == epoch.epochs:
            checkpoints.save(epoch.epoch, fit.save())
        yield epoch
    if fit.best is None:
        raise RuntimeError(f"client {assignment.client!r} fitted no epoch of its expert")
    expert = Expert(
        client=assignment.client,
        n_real=sum(len(indices) for indices in assignment.share.values()),
        n_drawn=sum(shard.n for shard in assignment.shards),
        downlink_bytes=assignment.downlink_bytes,
        epoch=fit.best.epoch,
        validation_accuracy=fit.best.validation_accuracy,
        history=tuple(fit.history),
        fingerprint=made_of,
        files={WEIGHTS: storage.write(f"{folder}/{WEIGHTS}", safetensors.torch.save(fit.best_weights))},
    )
    keep(storage, expert)
    checkpoints.delete()
    yield expert
