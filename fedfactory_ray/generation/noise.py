"""Seeds of images' noise: no two images of a module start from the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from fedfactory_ray.seeds import derive_seed

KEPT = 2**32
"""torch's CPU generator keeps 32 bits of a seed: seeds that are alike in these give the same noise."""


def noise_seed(seed: int, index: int, attempt: int = 0) -> int:
    """The seed of the noise of an image, by its index in the unit whose seed is given."""
    return derive_seed(seed, index, *([attempt] if attempt else []))


@lru_cache(maxsize=4096)
def _first(seed: int, unit_size: int) -> np.ndarray:
    """What torch keeps of the first seeds of a unit's images, uint64 (unit_size,)."""
    return np.array([noise_seed(seed, index) % KEPT for index in range(unit_size)], np.uint64)


def attempts(unit_seeds: Sequence[int], unit_size: int) -> dict[int, int]:
    """For the last of a module's units, given the seeds of all up to it, in order: the images whose first noise an
    earlier image of the module has already, each with the attempt that gives it noise of its own.

    It depends on no later image, so a module's images stay when more are drawn.
    """
    first = np.concatenate([_first(seed, unit_size) for seed in unit_seeds])
    if len(np.unique(first)) == len(first):
        return {}
    taken: set[int] = set()
    found: dict[int, int] = {}
    for place, kept in enumerate(first.tolist()):
        unit, index = divmod(place, unit_size)
        attempt = 0
        while kept in taken:
            attempt += 1
            kept = noise_seed(unit_seeds[unit], index, attempt) % KEPT
        taken.add(kept)
        if attempt and unit == len(unit_seeds) - 1:
            found[index] = attempt
    return found
