"""A client's expert: a classifier of all classes, from its own real images and the pool of synthetic ones."""

from __future__ import annotations

import hashlib
import json
import posixpath
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors.torch

from fedfactory_ray.classification.batches import BalancedBatches, Group, keep_side
from fedfactory_ray.classification.card import verified_card
from fedfactory_ray.classification.fitting import PROGRESS, Epoch, Fit
from fedfactory_ray.data.partition import own_indices
from fedfactory_ray.data.source import Source, Task
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.seeds import derive_seed
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import WEIGHTS, expert_folder
from fedfactory_ray.synthesis.shard import Shard, images_of, read_shards

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Expert:
    """A fitted expert in storage: `<folder>/model.safetensors`. `real` counts the client's images."""

    client: str
    fingerprint: str
    sha256: str
    real: int
    pool: int
    downlink_bytes: int
    epoch: int
    validation_accuracy: float
    history: tuple[Epoch, ...]

    @property
    def folder(self) -> str:
        """Where the expert lies in a run's storage."""
        return expert_folder(self.client)


@dataclass(frozen=True)
class Assignment:
    """What a client needs to fit its expert: its share, and of every class that it has not enough of, the pool's
    shards and the bytes of the other clients' modules."""

    client: str
    share: dict[int, np.ndarray]
    shards: tuple[Shard, ...]
    downlink_bytes: int
    task: Task

    def needed(self, config: Config) -> set[int]:
        """The classes of which the client holds too few."""
        return {y for y in range(self.task.classes) if real_share(config, len(self.share.get(y, ()))) < 1}

    def fingerprint(self, config: Config) -> str:
        """Digest of all that determines the expert."""
        recipe = [
            self.client,
            {
                label: hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()
                for label, indices in self.share.items()
            },
            [shard.rows_sha256 for shard in self.shards],
            config.classifier.model_dump(mode="json"),
            config.experts.model_dump(mode="json"),
            config.synthesis.images_per_class,
            config.resources.client.threads,
            config.seed,
        ]
        return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def assign(
    config: Config,
    client: str,
    share: dict[int, np.ndarray],
    manifest: list[Shard],
    cards: list[ModuleCard],
    task: Task,
) -> Assignment:
    """What `client` gets: synthetic images of each class of which it holds fewer than the quota.

    The pool is drawn once and read by all. A client that draws by itself needs the other clients' modules of these
    classes instead and gets the same bytes, so these are what is counted as its downlink.
    """
    bare = Assignment(client, share, (), 0, task)
    needed = bare.needed(config)
    modules = [card for card in cards if card.client != client and card.label in needed]
    return replace(
        bare,
        shards=tuple(shard for shard in manifest if shard.label in needed),
        downlink_bytes=sum(card.upload_bytes for card in modules),
    )


def real_share(config: Config, images: int) -> float:
    """Share of real images among those of a class that an epoch shows to a client which holds `images` of it."""
    return min(images / config.synthesis.images_per_class, config.experts.real_share)


def make_batches(
    config: Config, assignment: Assignment, source: Source, storage: Storage
) -> tuple[BalancedBatches, BalancedBatches]:
    """Training and validation batches, in which all classes are alike in number and real images have `real_share`.

    Every (1 / validation_fraction)-th image by place validates, of the client's own as of the pool's.
    """
    fraction, shape = config.classifier.validation_fraction, assignment.task.image_shape
    period, quota = round(1 / fraction), config.synthesis.images_per_class
    indices = [own_indices(config, source, label, places) for label, places in assignment.share.items()]
    held = np.split(source.images("train", np.concatenate(indices)), np.cumsum([len(i) for i in indices])[:-1])
    real = dict(zip(assignment.share, held, strict=True))
    sides: tuple[list[Group], list[Group]] = ([], [])
    for y in range(assignment.task.classes):
        own = real.get(y, np.empty((0, *shape), np.uint8))
        validates = np.arange(len(own)) % period == period - 1
        pool = read_shards(storage, [shard.file for shard in assignment.shards if shard.label == y])
        for side, groups in zip((False, True), sides, strict=True):
            drawn = keep_side(pool, config.synthesis.unit_size, fraction, validation=side)
            shown = round(quota * (fraction if side else 1 - fraction))
            groups += compose(y, own[validates == side], images_of(drawn, shape), shown, real_share(config, len(own)))
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
    config: Config, assignment: Assignment, source: Source, storage: Storage, device: torch.device
) -> Iterator[Epoch | Expert]:
    """Fit a client's expert where its images are: its epochs, and at the end the expert, which is in storage then.

    It is the central classifier's recipe and code. A fit that broke off goes on from its last checkpoint.
    """
    recipe = config.classifier
    fingerprint, folder = assignment.fingerprint(config), expert_folder(assignment.client)
    training, validation = make_batches(config, assignment, source, storage)
    fit = Fit(recipe, assignment.task, training.steps, training.seed, device)
    checkpoints = Checkpoints.of(storage, folder, fingerprint)
    checkpoints.load(fit)
    for epoch in fit.epochs(training, validation):
        if epoch.epoch % recipe.checkpoint_every == 0 or epoch.epoch == epoch.epochs:
            checkpoints.save(fit)
        yield epoch
    if fit.best is None:
        raise RuntimeError(f"client {assignment.client!r} fitted no epoch of its expert")
    weights = safetensors.torch.save(fit.best_weights)
    expert = Expert(
        client=assignment.client,
        fingerprint=fingerprint,
        sha256=hashlib.sha256(weights).hexdigest(),
        real=sum(len(indices) for indices in assignment.share.values()),
        pool=sum(shard.n for shard in assignment.shards),
        downlink_bytes=assignment.downlink_bytes,
        epoch=fit.best.epoch,
        validation_accuracy=fit.best.validation_accuracy,
        history=tuple(fit.history),
    )
    storage.write(f"{folder}/{WEIGHTS}", weights)
    storage.write_json(f"{folder}/card.json", asdict(expert))
    checkpoints.delete()
    yield expert


def stored_expert(config: Config, assignment: Assignment, storage: Storage) -> Expert | None:
    """The expert of an earlier start, if it was fitted on the same by the same recipe and verifies."""
    folder = expert_folder(assignment.client)
    fingerprint = assignment.fingerprint(config)
    card = verified_card(storage, folder, fingerprint)
    if card is None:
        return None
    Checkpoints.of(storage, folder, fingerprint).delete()  # of a start that was killed at its very end
    return Expert(**card | {"history": tuple(Epoch(**epoch) for epoch in card["history"])})


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of one fit in storage, a folder for each epoch; the newest whole one counts. `every` holds those of
    other settings too."""

    storage: Storage
    every: str
    folder: str

    @classmethod
    def of(cls, storage: Storage, folder: str, fingerprint: str) -> Checkpoints:
        """Those of the expert in `folder` that `fingerprint` determines."""
        every = f"{folder}/checkpoints"
        return cls(storage, every, f"{every}/{fingerprint[:16]}")

    def save(self, fit: Fit) -> None:
        """Keep the fit's state, and no older one."""
        with tempfile.TemporaryDirectory() as local:
            fit.save(local)
            files = {path.name: path.read_bytes() for path in Path(local).iterdir()}
        epoch = f"{self.folder}/{len(fit.history):05d}"
        for name in sorted(files, key=lambda name: name == PROGRESS):  # the mark of a whole checkpoint goes last
            self.storage.write(f"{epoch}/{name}", files[name])
        for older in self._whole()[:-1]:
            self.storage.filesystem.delete_dir(self.storage.path(older))

    def load(self, fit: Fit) -> None:
        """Take the newest state, if there is one."""
        for newest in self._whole()[-1:]:
            with tempfile.TemporaryDirectory() as local:
                for name in self.storage.names(newest):
                    Path(local, posixpath.basename(name)).write_bytes(self.storage.read(name))
                fit.load(local)

    def delete(self) -> None:
        """Delete them all, and those of fits with other settings that were not finished."""
        self.storage.delete_folder(self.every)

    def _whole(self) -> list[str]:
        """Folders of whole checkpoints, the oldest first."""
        return [posixpath.dirname(name) for name in self.storage.names(self.folder) if name.endswith(f"/{PROGRESS}")]
