"""The survey before anything starts: what the data are, and who holds how much of which class.

This process reads labels, names and files' headers; an image is read by workers alone.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import ray

from fedfactory_ray.cluster.absence import gather
from fedfactory_ray.cluster.joining import cluster_to_join
from fedfactory_ray.cluster.plan import Plan, placement, refuse_unknown_places
from fedfactory_ray.data.image_folder import ImageFolder
from fedfactory_ray.data.partition import Partition, held_elsewhere, make_partition, own_indices, still_held
from fedfactory_ray.data.readers import ArrayFile, is_here, open_source
from fedfactory_ray.data.source import DataInfo, Source, inspect, told_skipped
from fedfactory_ray.errors import ConfigError, DataInvalidError, DataMissingError, PartitionError
from fedfactory_ray.federation.exchange import offered_cards
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.data import SiloConfig, is_named
from fedfactory_ray.settings.paths import SUBMITTED
from fedfactory_ray.storage.artefact import fingerprint

log = logging.getLogger(__name__)
Survey = tuple[DataInfo, Partition, list[ModuleCard]]
DECODE_SECONDS = 60.0
"""Longest that the files which only the end of a run reads are tried."""
PLACES = 16
"""Pixels or patches a side on which the presets for CPUs let a network work, at most."""
READ_AT_ONCE = 2**29
"""Bytes of images that one task reads to tell their fingerprints."""


def survey_here(config: Config) -> Survey | None:
    """What `survey` tells, as far as this machine sees it, before Ray starts; None where only the cluster's nodes know.

    CIFAR-10 that is there is left to workers: torch, which opens it, takes seconds to load. Raises as `survey` does.
    """
    alone = cluster_to_join() is None and not ray.is_initialized()
    if not is_here(config.data):
        if config.typed(config.data.source) != config.data.source and SUBMITTED in os.environ:
            uploaded = "the job's working directory, which is uploaded without what .gitignore and .rayignore name"
            mend = "--data.source with the path of a shared folder"
            raise DataMissingError(config.data.source, None, f"{uploaded} (*.npz, runs/, …): {mend}")
        if alone:
            open_source(config.data)
        return None
    if config.data.source == "cifar10":
        return None
    info, labels = inspect(open_source(config.data), trains=not config.apart)
    refuse_resolution(config, info)
    if config.modules is None and config.partition.scheme == "natural":
        for silo in _taking_part(config) if alone else ():
            open_source(config.with_class_names(info.class_names).data_of(silo.name))
        return None
    return _dealt(config, info, labels)


def survey(config: Config) -> Survey:
    """Facts of the data, the partition, and the cards of modules that were trained elsewhere.

    Every source is read where it lies: by any node, or by the nodes that may read a natural silo. Raises
    DataMissingError, DataInvalidError, PartitionError, ModuleRefusedError or ResourcesError.
    """
    info, labels = ray.get(_inspect.remote(config))
    refuse_resolution(config, info)
    if config.modules is None and config.partition.scheme == "natural":
        _tell(config.data.source, info.skipped)
        return info, _natural(config, info), []
    return _dealt(config, info, labels)


def _dealt(config: Config, info: DataInfo, labels: np.ndarray) -> Survey:
    """The survey of data that one place may read."""
    _tell(config.data.source, info.skipped)
    excluded = config.partition.exclude
    if config.modules is None:
        return info, make_partition(config.partition, labels, info.classes, config.seed).without(excluded), []
    cards = offered_cards(config.modules, info, config.generator.min_images)
    partition = held_elsewhere({card.key: card.n_images for card in cards}, info.classes)
    _refuse_missing(config.modules, "module", partition, info, excluded)
    partition = partition.without(still_held(partition, excluded))
    return info, partition, [card for card in cards if card.label in partition.shares.get(card.client, {})]


def _taking_part(config: Config) -> list[SiloConfig]:
    """The natural silos that are not left out whole: the source of one that was forgotten may be gone."""
    return [silo for silo in config.partition.silos if silo.name not in config.partition.exclude]


def _natural(config: Config, info: DataInfo) -> Partition:
    """The partition that natural silos tell of."""
    excluded = config.partition.exclude
    unknown = {entry.partition("/")[0] for entry in excluded} - {silo.name for silo in config.partition.silos}
    if unknown:
        raise PartitionError(
            f"partition.exclude has {', '.join(sorted(unknown))}, unknown",
            f"names of partition.silos: {', '.join(silo.name for silo in config.partition.silos)}",
            "another entry in partition.exclude",
        )
    taking_part = _taking_part(config)
    refuse_unknown_places(taking_part)
    agreed = config.with_class_names(info.class_names)
    asked = {
        _inspect_silo.options(**placement(config, silo.name)).remote(agreed, silo.name, info): silo.name
        for silo in taking_part
    }
    found = dict(zip(asked.values(), gather(asked, config), strict=True))
    counts = {(client, label): n for client, (held, _) in found.items() for label, n in enumerate(held) if n}
    for client, (_, skipped) in found.items():
        _tell(client, skipped)
    partition = held_elsewhere(counts, info.classes)
    _refuse_missing("partition.silos", "silo with a training image", partition, info, excluded)
    return partition.without(still_held(partition, [entry for entry in excluded if "/" in entry]))


def _tell(where: str, skipped: dict[str, int]) -> None:
    if skipped:
        log.warning("%s", told_skipped(where, skipped))


def _refuse_missing(where: str, what: str, partition: Partition, info: DataInfo, excluded: Sequence[str]) -> None:
    """Raise DataInvalidError for classes that nobody holds; whom a run leaves out may have held them alone."""
    names = [name for name, n in zip(info.class_names, partition.matrix().sum(0), strict=True) if not n]
    if names and not excluded:
        raise DataInvalidError(where, f"no {what} of class {', '.join(names)}", "every class")
    if names:
        log.warning("nobody is left with class %s: no image of it is drawn", ", ".join(names))


def check_offered(config: Config, partition: Partition, class_names: Sequence[str]) -> None:
    """Tell the classes of which every client's images are too few to train a module. Raises PartitionError where no
    module would be trained at all."""
    least = config.generator.min_images
    offered = {label for _, label, _ in partition.offered(least)}
    if not offered and config.modules is None:
        raise PartitionError(
            f"no client holds {least} images of a class",
            f"generator.min_images={least} to train a module: one of fewer images is a copy of them",
            "fewer clients, or a smaller generator.min_images where a copy may leave its client",
        )
    held = {label for _, label, _ in partition}
    absent = [class_names[label] for label in sorted(held - offered)]
    if absent:
        told = "nobody may offer class %s, of which each client holds fewer than %d images: no image of it is drawn"
        log.warning(told, ", ".join(absent), least)


def read_images(config: Config, partition: Partition, info: DataInfo) -> Partition:
    """The partition with the fingerprints of its images, which tasks read where they lie, some shares each."""
    parts: list[list[tuple[str, int, np.ndarray]]] = []
    room = 0
    for client, label, places in partition:
        size = len(places) * info.channels * info.resolution**2
        apart = config.partition.scheme == "natural" and parts and parts[-1][-1][0] != client
        if not parts or apart or size > room:
            parts.append([])
            room = READ_AT_ONCE
        parts[-1].append((client, label, places))
        room -= size
    asked = {
        _read_images.options(**placement(config, part[0][0])).remote(config, info, part): part[0][0] for part in parts
    }
    found = {key: digest for told in gather(asked, config) for key, digest in told.items()}
    return replace(partition, images_sha256=found)


@ray.remote
def _read_images(
    config: Config, info: DataInfo, shares: list[tuple[str, int, np.ndarray]]
) -> dict[tuple[str, int], str]:
    """Fingerprints of the images of shares (client, class, places) that lie in one source."""
    source = open_source(config.with_class_names(info.class_names).data_of(shares[0][0]))
    indices = [own_indices(config, source, label, places) for _, label, places in shares]
    images = np.split(source.images("train", np.concatenate(indices)), np.cumsum([len(i) for i in indices])[:-1])
    return {(client, label): fingerprint(own) for (client, label, _), own in zip(shares, images, strict=True)}


def refuse_resolution(config: Config, info: DataInfo) -> None:
    """Raise ConfigError for images whose side the generator's network cannot halve."""
    try:
        config.generator.check_resolution(info.resolution)
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def streams(config: Config, info: DataInfo, partition: Partition) -> bool:
    """Whether one of a run's fits reads its rows anew each epoch, because a worker would not hold them."""
    drawn = config.synthesis.images_per_class * info.classes
    real = int(partition.matrix().sum()) if config.references else 0
    return not config.resources.holds(max(drawn, real), info.task.image_shape)


def try_files(config: Config) -> None:
    """Have a worker decode validation and test images of people's own files, which nothing else does before everything
    is trained, for DECODE_SECONDS. Raises DataInvalidError."""
    if not is_named(config.data.source):
        untried = ray.get(_try_files.remote(config))
        if untried:
            log.warning("%s: %d val and test images were not tried, for lack of time", config.data.source, untried)


def warn_of_size(config: Config, info: DataInfo, plan: Plan) -> None:
    """Tell of images that make a network on CPUs work on more places than presets for CPUs let it."""
    places = info.resolution // config.generator.patch
    if not plan.client.num_gpus and config.modules is None and places > PLACES:
        log.warning(
            "images of %d pixels a side with generator.patch=%d: on CPUs a step takes about %d times as long as with "
            "%d places a side; --plan tells how long all takes, a larger generator.patch, a smaller data.resolution or "
            "--preset folder-cpu make it shorter",
            info.resolution, config.generator.patch, round((places / PLACES) ** 2), PLACES,
        )  # fmt: skip


def check_files(source: Source, seconds: float = DECODE_SECONDS) -> int:
    """Decode a source's validation and test images; returns how many of them had no turn because `seconds` were over.
    Raises DataInvalidError."""
    if not isinstance(source, ImageFolder | ArrayFile):
        return 0
    until = time.monotonic() + seconds
    return source.try_images("val", until) + source.try_images("test", until)


@ray.remote
def _try_files(config: Config) -> int:
    return check_files(open_source(config.data))


@ray.remote
def _inspect(config: Config) -> tuple[DataInfo, np.ndarray]:
    """Facts and training labels."""
    return inspect(open_source(config.data), trains=not config.apart)


@ray.remote
def _inspect_silo(config: Config, client: str, info: DataInfo) -> tuple[list[int], dict[str, int]]:
    """Number of training images of each class of a natural silo, and of the files that were skipped, by kind."""
    source = open_source(config.data_of(client))
    found, labels = inspect(source, trains=False, tests=False)
    if not len(labels):
        raise DataInvalidError(source.path, "no train images", "training images of the silo's own classes")
    ours, theirs = ((i.class_names, i.resolution, i.channels) for i in (found, info))
    if ours != theirs:
        raise DataInvalidError(source.path, f"classes, side and channels {ours}", f"those of the test split, {theirs}")
    return found.counts["train"], found.skipped
