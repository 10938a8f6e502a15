"""Fuzzing: how many inputs a reader is tried with, and how much memory it may take for each."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

MEGABYTES = 300

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def fuzzed(examples: int) -> Any:
    """Decorator: so many examples in every test run, FUZZ_EXAMPLES of them where that is set."""
    number = int(os.environ.get("FUZZ_EXAMPLES", examples))
    unhealthy = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=number, deadline=None, suppress_health_check=unhealthy)


@contextmanager
def little_memory() -> Iterator[None]:
    """Fail where the block has taken more than MEGABYTES of Python's memory or of Arrow's."""
    most = max(pa.default_memory_pool().max_memory(), MEGABYTES * 2**20)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEGABYTES * 2**20
        assert pa.default_memory_pool().max_memory() <= most
    finally:
        tracemalloc.stop()


def changed(content: bytes) -> Any:
    """A strategy: `content` with some bytes changed, and perhaps cut off."""
    byte = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))

    def change(drawn: tuple[list[tuple[int, int]], int]) -> bytes:
        made = bytearray(content)
        for place, value in drawn[0]:
            made[place] = value
        return bytes(made[: drawn[1]])

    whole = st.just(len(content))
    return st.tuples(st.lists(byte, max_size=4), whole | whole | st.integers(0, len(content))).map(change)
