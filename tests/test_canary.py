"""The canary: equal wherever the same is computed, another where kernels are others, and without a trace."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from fedfactory_ray.cluster.devices import prepare_process
from fedfactory_ray.generation import canary as canaries
from fedfactory_ray.generation.canary import canary, compute, joined

CPU = torch.device("cpu")
ASK = """
import torch
from fedfactory_ray.cluster.devices import prepare_process
from fedfactory_ray.generation.canary import canary
print(canary(prepare_process(1, torch.device("cpu")), "fp32"))
"""


@pytest.fixture(autouse=True)
def _prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_process(1, CPU)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


def test_other_processes_have_the_same_unless_their_kernels_are_others() -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", ASK], env=os.environ | more, stdout=subprocess.PIPE, text=True)
        for more in ({}, {"ATEN_CPU_CAPABILITY": "default"})
    ]
    same, other = (process.communicate()[0].strip() for process in processes)
    assert same == canary(CPU, "fp32")
    assert len(other) == len(same) == 64
    assert other != same


def test_other_arithmetic_and_other_threads_have_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert canary(CPU, "fp32") != canary(CPU, "bf16")
    made = []
    monkeypatch.setattr(canaries, "_canary", lambda *of: made.append(of))
    canary(CPU, "fp32")
    torch.set_num_threads(2)
    canary(CPU, "fp32")
    torch.set_num_threads(1)
    assert made == [(CPU, "fp32", 1), (CPU, "fp32", 2)]


def test_nobody_notices_that_it_was_computed() -> None:
    def state() -> list[object]:
        (_, numbers, *rest) = np.random.get_state()
        return [
            *(torch.get_rng_state().tolist(), random.getstate(), np.asarray(numbers).tolist(), rest),
            *(torch.get_default_dtype(), torch.get_deterministic_debug_mode(), torch.get_num_threads()),
            *(torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.backends.cudnn.benchmark),
        ]

    before = state()
    again = canaries._canary.__wrapped__(CPU, "fp32", 1)
    assert state() == before
    torch.manual_seed(99)
    assert canaries._canary.__wrapped__(CPU, "fp32", 1) == again == canary(CPU, "fp32")


def test_every_parameter_has_a_gradient_to_tell_of() -> None:
    *gradients, images = compute(CPU, "fp32")
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    assert images.shape == (8, 1, 16, 16)
    assert torch.isfinite(images).all()


def test_work_that_several_did_has_the_canaries_of_all() -> None:
    assert joined("a", "a") == "a"
    assert joined("b", "a") == joined("a+b", "a") == "a+b"
    assert joined("", "a") == "+a"  # a checkpoint of an earlier version
