"""A process that computes: what it is told before it begins."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
if sys.argv[1] == "kept":
    from fedfactory_ray.cluster.devices import keep_freed_memory
    keep_freed_memory()
def step():
    blocks = [np.empty(20 * 2**20, np.uint8) for _ in range(4)]
    for block in blocks:
        block[::4096] = 1
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc what to keep")
def test_memory_that_a_step_frees_is_there_for_the_next() -> None:
    def faults(mode: str) -> int:
        job = [sys.executable, "-c", FAULTS, mode]
        return int(subprocess.run(job, capture_output=True, text=True, check=True).stdout)

    assert faults("kept") < faults("as it is") / 10
