"""The survey before anything starts: what the data are, and who holds how much of which class."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import ray

from fedfactory_ray.cluster.plan import placement, refuse_unknown_places
from fedfactory_ray.data.partition import Partition, held_elsewhere, make_partition, still_held
from fedfactory_ray.data.source import DataInfo
from fedfactory_ray.errors import DataInvalidError, PartitionError
from fedfactory_ray.federation.exchange import read_cards
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.settings.config import Config

READ_AT_ONCE = 2**29
"""Bytes of images that one task reads to tell their fingerprints."""


def survey(config: Config) -> tuple[DataInfo, Partition, list[ModuleCard]]:
    """Facts of the data, the partition, and the cards of modules that were trained elsewhere.

    Every source is read where it lies: by any node, or by the nodes that may read a natural silo. Raises
    DataMissingError, DataInvalidError, PartitionError, ModuleRefusedError or ResourcesError.
    """
    info, labels = ray.get(_inspect.remote(config))
    excluded = config.partition.exclude
    if config.modules is not None:
        cards = read_cards(config.modules, info)
        partition = held_elsewhere({card.key: card.n_images for card in cards}, info.classes)
        partition = partition.without(still_held(partition, excluded))
        return info, partition, [card for card in cards if card.label in partition.shares.get(card.client, {})]
    if config.partition.scheme == "natural":
        return info, _natural(config, info), []
    partition = make_partition(config.partition, labels, info.classes, config.seed).without(excluded)
    return info, replace(partition, images_sha256=_fingerprints(config, partition, info)), []


def _natural(config: Config, info: DataInfo) -> Partition:
    """The partition that natural silos tell of: counts and fingerprints are all that leaves their nodes."""
    excluded = config.partition.exclude
    unknown = {entry.partition("/")[0] for entry in excluded} - {silo.name for silo in config.partition.silos}
    if unknown:
        raise PartitionError(
            f"partition.exclude has {', '.join(sorted(unknown))}, unknown",
            f"names of partition.silos: {', '.join(silo.name for silo in config.partition.silos)}",
            "another entry in partition.exclude",
        )
    taking_part = [silo for silo in config.partition.silos if silo.name not in excluded]
    refuse_unknown_places(taking_part)
    asked = [
        _inspect_silo.options(**placement(config, silo.name)).remote(config, silo.name, info) for silo in taking_part
    ]
    told = {
        (silo.name, label): held
        for silo, found in zip(taking_part, ray.get(asked), strict=True)
        for label, held in found.items()
    }
    missing = sorted(set(range(info.classes)) - {label for _, label in told})
    if missing and not excluded:
        names = ", ".join(info.class_names[y] for y in missing)
        raise DataInvalidError("partition.silos", f"no silo with a training image of class {names}", "every class")
    partition = held_elsewhere({key: n for key, (n, _) in told.items()}, info.classes)
    partition = replace(partition, images_sha256={key: digest for key, (_, digest) in told.items()})
    return partition.without(still_held(partition, [entry for entry in excluded if "/" in entry]))


def _fingerprints(config: Config, partition: Partition, info: DataInfo) -> dict[tuple[str, int], str]:
    """Fingerprints of all shares' images, which tasks read side by side, some shares each."""
    parts: list[list[tuple[tuple[str, int], np.ndarray]]] = [[]]
    room = READ_AT_ONCE
    for client, label, indices in partition:
        size = len(indices) * info.channels * info.resolution**2
        if parts[-1] and size > room:
            parts.append([])
            room = READ_AT_ONCE
        parts[-1].append(((client, label), indices))
        room -= size
    found: dict[tuple[str, int], str] = {}
    for told in ray.get([_fingerprint.remote(config, part) for part in parts]):
        found |= told
    return found


@ray.remote
def _fingerprint(config: Config, shares: list[tuple[tuple[str, int], np.ndarray]]) -> dict[tuple[str, int], str]:
    from fedfactory_ray.data.readers import open_source
    from fedfactory_ray.storage.artefact import fingerprint

    images = open_source(config.data).images("train", np.concatenate([indices for _, indices in shares]))
    parts = np.split(images, np.cumsum([len(indices) for _, indices in shares])[:-1])
    return {key: fingerprint(part) for (key, _), part in zip(shares, parts, strict=True)}


@ray.remote
def _inspect(config: Config) -> tuple[DataInfo, np.ndarray]:
    from fedfactory_ray.data.readers import open_source
    from fedfactory_ray.data.source import inspect

    return inspect(open_source(config.data), trains=not config.apart)


@ray.remote
def _inspect_silo(config: Config, client: str, info: DataInfo) -> dict[int, tuple[int, str]]:
    """By class that a natural silo holds, number and fingerprint of its training images: all that leaves its node."""
    from fedfactory_ray.data.readers import open_source
    from fedfactory_ray.data.source import inspect
    from fedfactory_ray.storage.artefact import fingerprint

    source = open_source(config.data_of(client), info.class_names)
    found, labels = inspect(source, trains=False, tests=False)
    if not len(labels):
        raise DataInvalidError(source.path, "no train images", "training images of the silo's own classes")
    ours, theirs = ((i.class_names, i.resolution, i.channels) for i in (found, info))
    if ours != theirs:
        raise DataInvalidError(source.path, f"classes, side and channels {ours}", f"those of the test split, {theirs}")
    images = source.images("train")
    return {y: (n, fingerprint(images[labels == y])) for y, n in enumerate(found.counts["train"]) if n}
