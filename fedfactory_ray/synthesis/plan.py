"""The plan of synthesis: which module draws how many images, in units that any worker draws alike."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from fedfactory_ray.data.partition import Partition
from fedfactory_ray.errors import ConfigError
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.generation.noise import attempts
from fedfactory_ray.seeds import derive_seed
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.artefact import fingerprint
from fedfactory_ray.storage.layout import unit_file


@dataclass(frozen=True)
class Unit:
    """`n` images of one module. They depend on no other unit; a smaller `n` gives the first of the same images."""

    client: str
    label: int
    index: int
    n: int
    seed: int
    module_sha256: str

    @property
    def file(self) -> str:
        """Name of the unit's Parquet file in a run's storage."""
        return unit_file(self.client, self.label, self.index)

    def attempts(self, config: Config) -> dict[int, int]:
        """The images whose first noise an earlier image of the module has, see `generation.noise`."""
        seeds = [unit_seed(config.seed, self.client, self.label, index) for index in range(self.index + 1)]
        return attempts(seeds, config.synthesis.unit_size)

    def fingerprint(self, config: Config, card: ModuleCard) -> str:
        """What determines its images: the module, of that card, how it is drawn from, noise and number. What `auto`
        comes to is told by the module: it was trained in that arithmetic."""
        precision = card.precision if config.generator.precision == "auto" else config.generator.precision
        drawing = [config.sampler.determining(), config.synthesis.batch_size, precision]
        # Of no image, but for one in a million; earlier versions drew such an image twice.
        drawing += [sorted(again.items())] if (again := self.attempts(config)) else []
        return fingerprint("unit", asdict(self), drawing, config.resources.synthesis.threads)


def unit_seed(seed: int, client: str, label: int, index: int) -> int:
    """The seed of a unit in a run of this seed."""
    return derive_seed(seed, "synthesis", client, label, index)


def quotas(counts: dict[str, int], total: int) -> dict[str, int]:
    """Share `total` images among clients in proportion to `counts`: Webster's method, ties by name.

    Each image goes to the client with the largest count / (2 · quota + 1). So a larger total takes no image from
    anybody, and when a client goes, the others only gain: what was drawn stays. Largest remainders do not keep that
    (the Alabama paradox; Balinski and Young 1982, "Fair Representation").
    """
    shares = dict.fromkeys(counts, 0)
    queue = [(-float(n), client) for client, n in counts.items() if n]
    heapq.heapify(queue)
    for _ in range(total):
        _, client = queue[0]
        shares[client] += 1
        heapq.heapreplace(queue, (-counts[client] / (2 * shares[client] + 1), client))
    return shares


def check_fraction(config: Config) -> None:
    """Raise ConfigError for a share of images that validate which is not kept: every so-many-th image does. Like
    `check_validation`, it lets runs that are made by forgetting pass."""
    fraction = config.classifier.validation_fraction
    period = round(1 / fraction)
    if abs(period * fraction - 1) > 0.02 and not config.partition.exclude:
        kept = [f"{1 / every:.4g}" for every in sorted({max(2, int(1 / fraction)), int(1 / fraction) + 1})]
        raise ConfigError(
            [
                f"classifier.validation_fraction={fraction:g}: every so-many-th image validates, so it would act as "
                f"{1 / period:.4g}; needed {' or '.join(kept)}, or another 1/n"
            ]
        )


def check_validation(config: Config, partition: Partition) -> None:
    """Raise ConfigError for a plan in which a class has no image that validates. Of the images drawn from each client's
    module, every (1 / validation_fraction)-th validates.

    A run that is made by forgetting is never refused: the run that it is made from was accepted.
    """
    if config.partition.exclude:
        return
    images_per_class, period = config.synthesis.images_per_class, round(1 / config.classifier.validation_fraction)
    problems, by_label = [], dict[int, dict[str, int]]()
    for client, label, indices in partition.offered(config.generator.min_images):
        by_label.setdefault(label, {})[client] = len(indices)
    for label, counts in sorted(by_label.items()):
        most = max(quotas(counts, images_per_class).values())
        if most < period:
            needed = -(-period * sum(counts.values()) // max(counts.values()))
            problems.append(
                f"synthesis.images_per_class={images_per_class}: found at most {most} images of class {label} drawn "
                f"from one client, of which none validates; needed {period}: about {needed} images a class, or a "
                "larger classifier.validation_fraction"
            )
    if problems:
        raise ConfigError(problems)


def make_units(cards: Iterable[ModuleCard], images_per_class: int, unit_size: int, seed: int) -> list[Unit]:
    """Units that draw `images_per_class` images of every class that a card offers, by class, client and index.

    A class of several clients is a mixture of their modules. A larger quota only appends images to a client's own.
    """
    by_label: dict[int, dict[str, ModuleCard]] = {}
    for card in cards:
        by_label.setdefault(card.label, {})[card.client] = card
    units = []
    for label, holders in sorted(by_label.items()):
        shares = quotas({client: card.n_images for client, card in holders.items()}, images_per_class)
        for client, quota in sorted(shares.items()):
            for index, start in enumerate(range(0, quota, unit_size)):
                n = min(unit_size, quota - start)
                own = unit_seed(seed, client, label, index)
                units.append(Unit(client, label, index, n, own, holders[client].sha256))
    return units
