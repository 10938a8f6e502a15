"""Seeds: every random number of a run follows from the run's seed and the names of what it is for."""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) from the SHA-256 of `parts`; the same on any platform and in any process.

    Parts are joined with their lengths, so that ("a", "bc") and ("ab", "c") differ.
    """
    text = "".join(f"{len(str(part))}:{part}," for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def random_state(*parts: int | str) -> np.random.RandomState:
    """A NumPy generator for `parts`; RandomState, whose streams NumPy froze for good, unlike Generator's."""
    return np.random.RandomState(derive_seed(*parts) % 2**32)
