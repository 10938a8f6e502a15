"""Joining a cluster: which one is found, and that a dead one is refused in seconds, before MLflow has a run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import ROOT

from fedfactory_ray.cluster import joining
from fedfactory_ray.cluster.joining import answers, cluster_to_join, refuse_gone
from fedfactory_ray.errors import ClusterGoneError


@pytest.fixture
def closed() -> str:
    """An address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def live() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which `ray start` leaves a cluster's address."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests of this process may be on a cluster
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


def test_rays_file_is_looked_for_where_ray_looks_for_it(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.utils import get_ray_address_file

    assert str(joining.address_file()) == str(get_ray_address_file(None)) == str(left)
    monkeypatch.delenv("RAY_TMPDIR")
    assert str(joining.address_file()) == str(get_ray_address_file(None))


def test_what_is_joined(left: Path, live: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster_to_join() is None
    refuse_gone()
    left.write_text(f"{live}\n")
    assert cluster_to_join() == (live, str(left))
    refuse_gone()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster_to_join() == ("10.0.0.1:6379", "$RAY_ADDRESS")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert cluster_to_join() == (live, str(left))
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert cluster_to_join() is None


def test_a_dead_clusters_file_and_a_dead_address_are_named(
    left: Path, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left.write_text(closed)
    with pytest.raises(ClusterGoneError, match=rf"{closed}[\s\S]*{left}[\s\S]*`rm {left}`"):
        refuse_gone()
    monkeypatch.setenv("RAY_ADDRESS", closed)
    with pytest.raises(ClusterGoneError, match=rf"{closed}[\s\S]*`unset RAY_ADDRESS`"):
        refuse_gone()


def test_forms_that_only_ray_knows_are_left_to_ray(live: str, closed: str) -> None:
    assert answers("anyscale://somewhere")
    assert answers(f"ray://{live}")
    assert not answers(f"ray://{closed}")


@pytest.mark.parametrize("cause", ["cluster", "data", "partition", "side"])
def test_a_refusal_leaves_no_mlflow_run(left: Path, closed: str, tmp_path: Path, cause: str) -> None:
    if cause == "cluster":
        left.write_text(closed)
    options = {
        "cluster": [],
        "data": ["--data.source", "nowhere.npz"],
        "partition": ["--partition.scheme", "dirichlet", "--partition.clients", "400", "--partition.min_size", "99"],
        "side": ["--data.resolution", "9"],
    }[cause]
    job = [sys.executable, str(ROOT / "jobs" / "run.py"), *options]
    done = subprocess.run(job, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    needle = {"cluster": closed, "data": "nowhere.npz", "partition": "artition", "side": "resolution"}[cause]
    assert needle in done.stderr
    assert not (tmp_path / "mlflow.db").exists() or not _runs(tmp_path / "mlflow.db")


def _runs(store: Path) -> list[str]:
    import sqlite3

    with sqlite3.connect(store) as database:
        tables = [name for (name,) in database.execute("select name from sqlite_master")]
        return [run for (run,) in database.execute("select run_uuid from runs")] if "runs" in tables else []
