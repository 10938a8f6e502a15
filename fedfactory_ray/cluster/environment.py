"""Environment: what results depend on beside the config, as a process sees it."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[1]
LIBRARIES = (
    *("torch", "torchvision", "diffusers", "accelerate", "numpy", "scipy", "scikit-learn", "pillow", "pyarrow", "ray"),
    "fedfactory-ray",
)
SETTINGS = (
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"),
    *("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DYNAMIC"),
    *("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
)
"""Variables by which a user chooses kernels, and so bytes."""
BUILT_WITH = {"mkl": r"Math Kernel Library Version (\S+)", "onednn": r"MKL-DNN v(\S+)"}
DRIVER = Path("/proc/driver/nvidia/version")


def environment(device: torch.device) -> dict[str, str]:
    """What results on `device` may depend on beside the config, by name: versions of libraries, the package's sources,
    processor, variables that choose kernels, the mode of determinism, and of a GPU its name and libraries. What is not
    known is left out."""
    capabilities = torch.cpu.get_capabilities()
    flags = sorted(name for name, value in capabilities.items() if value is True)
    found = {f"{name} version": _version(name) for name in LIBRARIES}
    found["fedfactory-ray sources"] = sources_sha256()
    found["processor"] = f"{capabilities.get('cpu_name', platform.machine())} ({' '.join(flags)})"
    found["cpu capability"] = torch.backends.cpu.get_cpu_capability()
    found["determinism"] = ("default", "warn", "error")[torch.get_deterministic_debug_mode()]
    built = {name: re.search(pattern, torch.__config__.show()) for name, pattern in BUILT_WITH.items()}
    found |= {name: match[1] for name, match in built.items() if match}
    found |= {name: os.environ[name] for name in SETTINGS if name in os.environ}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
        found["cudnn"] = str(torch.backends.cudnn.version())
        driver = re.search(r"\d+\.[\d.]+", DRIVER.read_text()) if DRIVER.exists() else None
        found |= {"driver": driver[0]} if driver else {}
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a working directory that a job brought along
        return "not installed"


@cache
def sources_sha256() -> str:
    """SHA-256 of this package's Python files, their names included."""
    files = {file.relative_to(PACKAGE).as_posix(): file for file in PACKAGE.rglob("*.py")}
    lines = [f"{name} {hashlib.sha256(files[name].read_bytes()).hexdigest()}\n" for name in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
