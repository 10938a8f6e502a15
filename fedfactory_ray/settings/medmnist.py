"""What MedMNIST tells of its sets."""

from __future__ import annotations

import runpy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@cache
def medmnist_info() -> dict[str, dict[str, Any]]:
    """MedMNIST's `INFO`, by flag: task, labels, addresses and MD5 of files.

    It stands in a file of its own, which imports nothing; the package imports torch and scikit-learn, 5 s of CPU.
    """
    package = find_spec("medmnist")
    assert package is not None and package.origin is not None
    info: dict[str, dict[str, Any]] = runpy.run_path(str(Path(package.origin).with_name("info.py")))["INFO"]
    return info
