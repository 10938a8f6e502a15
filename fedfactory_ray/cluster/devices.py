"""Devices: which one a process computes on, with which precision, and how it is made deterministic."""

from __future__ import annotations

import ctypes
import os
import random

import numpy as np
import torch

from fedfactory_ray.errors import ResourcesError
from fedfactory_ray.settings.sections import Precision


def assigned_device(gpu_ids: list[int] | list[str]) -> torch.device:
    """The device of an actor or task, given `ray.get_gpu_ids()`: its first GPU, or the CPU where Ray assigned none,
    even if the process could see a GPU. Ray narrows CUDA_VISIBLE_DEVICES to the assigned ones.

    Raises ResourcesError where Ray assigned a GPU that torch cannot use.
    """
    if not gpu_ids:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ResourcesError(
            f"GPU {', '.join(map(str, gpu_ids))} assigned by Ray, and torch {torch.__version__} without CUDA there",
            "a CUDA device that torch can use on every node that declares GPUs",
            "the NVIDIA driver and a CUDA build of torch on that node, or resources.*.num_gpus=0",
        )
    return torch.device("cuda", 0)


def gpu(gpu_ids: list[int] | list[str]) -> tuple[int, str]:
    """Bytes of memory of an assigned GPU, and what precision `auto` comes to on it. Raises ResourcesError."""
    device = assigned_device(gpu_ids)
    return torch.cuda.get_device_properties(device).total_memory, resolve_precision("auto", device)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""
LARGEST_KEPT, KEPT = 32 * 2**20, 256 * 2**20
"""Bytes of the largest block that glibc can be told to keep, and of what it keeps in all."""


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next step, instead of giving it back to the kernel and fetching it anew: up
    to a seventh of a CPU's time in drawing. Other C libraries go on as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def prepare_process(threads: int, device: torch.device) -> torch.device:
    """Fix what could vary in a process that computes on `device` with so many torch threads; returns the device.

    On CUDA an operation without a deterministic kernel raises RuntimeError. To be warned is not enough there: attention
    (flash, memory-efficient, cuDNN) would keep a backward pass that differs from run to run. In mode `error` torch
    takes the deterministic ones of the first two and leaves cuDNN's out (ATen/native/transformers/cuda/sdp_utils.cpp).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    keep_freed_memory()
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    # use_deterministic_algorithms would import the compiler: seconds
    torch.set_deterministic_debug_mode("error" if device.type == "cuda" else "warn")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # saves a pass
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def seed_process(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def resolve_precision(precision: Precision, device: torch.device) -> str:
    """`fp32`, `bf16` or `fp16`: `auto` takes bf16 where the hardware computes in it.

    On CPUs that means AVX512-BF16 or AMX; others emulate bf16 slowly.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


AUTOCAST_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Context in which networks compute in `precision` on `device`."""
    return torch.autocast(device.type, AUTOCAST_DTYPES[precision], enabled=precision != "fp32")
