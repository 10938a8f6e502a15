"""Clusters of several nodes on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from small_runs import ROOT


@contextmanager
def nodes(monkeypatch: pytest.MonkeyPatch, *each: dict[str, Any]) -> Iterator[Cluster]:
    """A cluster whose workers can import the package and the tests' hooks; this process does not join it."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    cluster = Cluster()
    try:
        for node in each:
            cluster.add_node(**{"include_dashboard": False, **node})
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
    finally:
        cluster.shutdown()
