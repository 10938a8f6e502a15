"""What must not change: the bytes of small runs of every kind."""

from __future__ import annotations

from pathlib import Path

import golden
import pytest


def test_small_runs_have_the_bytes_that_they_always_had(cluster: None, tmp_path: Path) -> None:
    machine, known = golden.machine(), golden.known()
    if machine not in known:
        pytest.skip(f"no digests of {machine}, only of {'; '.join(known)}: python tests/golden.py adds them")
    assert golden.make(tmp_path) == known[machine]
