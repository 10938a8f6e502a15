"""Clusters of several nodes on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
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


def workers(title: str) -> list[psutil.Process]:
    """Ray's worker processes by what they do; only of the clusters of this test process."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        command, environment = " ".join(process.info["cmdline"] or []), process.info["environ"] or {}
        if command.startswith(f"ray::{title}") and environment.get("RAY_TMPDIR") == os.environ["RAY_TMPDIR"]:
            found.append(process)
    return found
