"""Seeds of images' noise: no two images of a module start from the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from fedfactory_ray.seeds import derive_seed

KEPT = 2**32
"""torch's CPU generator keeps 32 bits of a seed: seeds that are alike in these give the same noise."""


def noise_seed(seed: int, index: int, attempt: int = 0) -> int:
    """The seed of the noise of an image, by its index in the unit whose seed is given."""
    return derive_seed(seed, index, *([attempt] if attempt else []))


class _Noises:
    """What torch keeps of the seeds of a module's images, unit after unit."""

    def __init__(self) -> None:
        self.unit_seeds: list[int] = []
        self.taken: set[int] = set()
        self.attempts: list[dict[int, int]] = []

    def add(self, unit_seed: int, unit_size: int) -> None:
        """Give the images of the next unit noises that no image before has."""
        found: dict[int, int] = {}
        for index in range(unit_size):
            attempt, kept = 0, noise_seed(unit_seed, index) % KEPT
            while kept in self.taken:
                attempt += 1
                kept = noise_seed(unit_seed, index, attempt) % KEPT
            self.taken.add(kept)
            if attempt:
                found[index] = attempt
        self.unit_seeds.append(unit_seed)
        self.attempts.append(found)


@lru_cache(maxsize=64)
def _noises(first_seed: int, unit_size: int) -> _Noises:
    """Those of the module whose first unit has this seed; what is known of a module's units is not looked at again."""
    return _Noises()


def attempts(unit_seeds: Sequence[int], unit_size: int) -> dict[int, int]:
    """For the last of a module's units, given the seeds of all up to it, in order: the images whose first noise an
    earlier image of the module has already, each with the attempt that gives it noise of its own.

    It depends on no later image, so a module's images stay when more are drawn.
    """
    known, seeds = _noises(unit_seeds[0], unit_size), list(unit_seeds)
    if known.unit_seeds[: len(seeds)] != seeds[: len(known.unit_seeds)]:
        known = _Noises()
    for seed in seeds[len(known.unit_seeds) :]:
        known.add(seed, unit_size)
    return known.attempts[len(seeds) - 1]
