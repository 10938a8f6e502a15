"""Joining: which Ray cluster this process will join, and the refusal of one that does not answer."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path

import ray

from fedfactory_ray.errors import ClusterGoneError

ANSWER_SECONDS = 5.0
"""How long a cluster's address may take to answer; Ray itself would try for minutes."""
ADDRESS = "RAY_ADDRESS"


def address_file() -> Path:
    """Where `ray start` leaves the address of this machine's cluster, and Ray looks for it."""
    linux = sys.platform.startswith("linux")
    default = os.environ.get("TMPDIR", "/tmp") if linux else tempfile.gettempdir()
    return Path(os.environ.get("RAY_TMPDIR", default), "ray", "ray_current_cluster")


def cluster_to_join() -> tuple[str, str] | None:
    """The cluster's address as Ray will find it, and what tells it; None where Ray will start on this machine."""
    told = os.environ.get(ADDRESS, "")
    if told == "local":
        return None
    if told not in ("", "auto"):
        return told, f"${ADDRESS}"
    file = address_file()
    found = file.read_text().strip() if file.is_file() else ""
    return (found, str(file)) if found else None


def answers(address: str) -> bool:
    """Whether something takes connections at an address `host:port`; true for other forms, which only Ray knows."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def refuse_gone() -> None:
    """Raise ClusterGoneError where the cluster to be joined takes no connection: Ray would wait for minutes."""
    found = None if ray.is_initialized() else cluster_to_join()
    if found is None or answers(found[0]):
        return
    address, told_by = found
    mend = f"unset {ADDRESS}" if told_by.startswith("$") else f"rm {told_by}"
    raise ClusterGoneError(
        f"nothing answers at {address}, the Ray cluster that {told_by} names",
        f"`{mend}` to run on this machine alone, or the address of a living cluster in {ADDRESS}",
    )
