"""Scaling: a cluster whose GPU nodes come when they are asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from autoscaled import GPU_NODE
from small_runs import LONGEST, ROOT

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def told() -> tuple[dict[str, Any], str]:
    """What the other process found, and what it said meanwhile."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    job = [sys.executable, str(ROOT / "tests" / "autoscaled.py")]
    done = subprocess.run(job, env=environment, capture_output=True, text=True, timeout=LONGEST, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_nodes_are_asked_for_waited_for_and_given_back(told: tuple[dict[str, Any], str]) -> None:
    found, said = told
    assert found["startable"] == [GPU_NODE, GPU_NODE]
    grown = found["grown"]
    assert grown["num_gpus"] == [1.0, 1.0, 1.0]
    assert grown["slots"] == 2, "as many as may come, though five would have work"
    assert grown["asked"] == [{"CPU": 1.0, "GPU": 1.0}] * 2
    assert "waiting for nodes from the autoscaler: 5 × (1 CPUs, 1 GPUs) for resources.client" in said
    assert (grown["startable"], grown["left"]) == ([], [])
    assert grown["again"], "what is there is not asked for"


def test_nodes_that_do_not_come_are_a_refusal(told: tuple[dict[str, Any], str]) -> None:
    refused = told[0]["refused"]
    for part in ("0.2 s after the autoscaler", "resources.client", "num_gpus=0"):
        assert part in refused["refusal"]
    assert refused["left"] == []
    assert refused["num_gpus"] == 0, "whoever asks for CPUs gets those that are there"
    assert "no further node came for 0.2 s" in told[1], "room for one: the rest need not come"
