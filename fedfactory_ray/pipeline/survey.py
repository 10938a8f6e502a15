"""The survey before anything starts: what the data are, and who holds how much of which class."""

from __future__ import annotations

import numpy as np
import ray

from fedfactory_ray.cluster.plan import placement, refuse_unknown_places
from fedfactory_ray.data.partition import Partition, held_elsewhere, make_partition, still_held
from fedfactory_ray.data.source import DataInfo
from fedfactory_ray.errors import DataInvalidError, PartitionError
from fedfactory_ray.federation.exchange import read_cards
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.settings.config import Config


def survey(config: Config) -> tuple[DataInfo, Partition, list[ModuleCard]]:
    """Facts of the data, the partition, and the cards of modules that were trained elsewhere.

    Every source is read where it lies: by any node, or by the nodes that may read a natural silo. Raises
    DataMissingError, DataInvalidError, PartitionError, ModuleRefusedError or ResourcesError.
    """
    info, labels = ray.get(_inspect.remote(config))
    excluded = config.partition.exclude
    if config.modules is not None:
        cards = read_cards(config.modules, info)
        counts = {card.key: card.images for card in cards}
        partition = held_elsewhere(counts, info.classes)
        partition = partition.without(still_held(partition, excluded))
        return info, partition, [card for card in cards if card.label in partition.shares.get(card.client, {})]
    if config.partition.scheme == "natural":
        unknown = {entry.partition("/")[0] for entry in excluded} - {silo.name for silo in config.partition.silos}
        if unknown:
            raise PartitionError(
                f"partition.exclude has {', '.join(sorted(unknown))}, unknown",
                f"names of partition.silos: {', '.join(silo.name for silo in config.partition.silos)}",
                "another entry in partition.exclude",
            )
        taking_part = [silo for silo in config.partition.silos if silo.name not in excluded]
        refuse_unknown_places(taking_part)
        surveys = [
            _inspect_silo.options(**placement(config, silo.name)).remote(config, silo.name, info)
            for silo in taking_part
        ]
        counts = {
            (silo.name, y): n
            for silo, found in zip(taking_part, ray.get(surveys), strict=True)
            for y, n in enumerate(found)
            if n
        }
        missing = sorted(set(range(info.classes)) - {y for _, y in counts})
        if missing and not excluded:
            names = ", ".join(info.class_names[y] for y in missing)
            raise DataInvalidError("partition.silos", f"no silo with a training image of class {names}", "every class")
        classes = [entry for entry in excluded if "/" in entry]
        partition = held_elsewhere(counts, info.classes)
        return info, partition.without(still_held(partition, classes)), []
    return info, make_partition(config.partition, labels, info.classes, config.seed).without(excluded), []


@ray.remote
def _inspect(config: Config) -> tuple[DataInfo, np.ndarray]:
    from fedfactory_ray.data.readers import open_source
    from fedfactory_ray.data.source import inspect

    return inspect(open_source(config.data), trains=not config.apart)


@ray.remote
def _inspect_silo(config: Config, client: str, info: DataInfo) -> list[int]:
    """Training images a class of a natural silo: all that leaves its node."""
    from fedfactory_ray.data.readers import open_source
    from fedfactory_ray.data.source import inspect

    source = open_source(config.data_of(client), info.class_names)
    found, _ = inspect(source, trains=False, tests=False)
    if not sum(found.counts["train"]):
        raise DataInvalidError(source.path, "no train images", "training images of the silo's own classes")
    ours, theirs = ((i.class_names, i.resolution, i.channels) for i in (found, info))
    if ours != theirs:
        raise DataInvalidError(source.path, f"classes, side and channels {ours}", f"those of the test split, {theirs}")
    return found.counts["train"]
