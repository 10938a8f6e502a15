"""What the tests' Ray workers do before anything else: note who opens or writes what, and take the CPU for a GPU.

A test names `hooks.watch` as Ray's worker_process_setup_hook and sets HOOK_LOG for the cluster's processes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def note(**facts: Any) -> None:
    """Append a line to the log."""
    import ray

    line = json.dumps({"node": ray.get_runtime_context().get_node_id(), "pid": os.getpid(), **facts}) + "\n"
    with open(os.environ["HOOK_LOG"], "a") as log:
        log.write(line)


def watch_sources(sources: ModuleType) -> None:
    """Note every array that this process reads."""
    read = sources.ArrayFile._read

    def watched_read(self: Any, *arguments: Any) -> Any:
        note(opened=self.path, key=arguments[0])
        return read(self, *arguments)

    sources.ArrayFile._read = watched_read  # type: ignore[attr-defined]


def watch_files(files: ModuleType) -> None:
    """Note every file that this process writes by a storage, wherever that is."""
    write = files.Storage.writing

    def watched_write(self: Any, name: str) -> Any:
        note(wrote=f"{self.uri}/{name}")
        return write(self, name)

    files.Storage.writing = watched_write  # type: ignore[attr-defined]


def watch_devices(devices: ModuleType) -> None:
    """Note the GPUs that this process is given, and compute on the CPU."""

    def watched_device(gpu_ids: list[int] | list[str]) -> Any:
        note(gpus=list(map(str, gpu_ids)), visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
        return devices.torch.device("cpu")

    devices.assigned_device = watched_device  # type: ignore[attr-defined]
    devices.gpu = lambda _: (80 * 10**9, "bf16")  # type: ignore[attr-defined]


class AfterImport:
    """Calls a function with a module as soon as it is imported, so that processes which do not need it start fast."""

    def __init__(self, functions: dict[str, Callable[[ModuleType], None]]) -> None:
        self.functions = functions

    def find_spec(self, name: str, *_: Any) -> Any:
        """Part of Python's protocol for sys.meta_path."""
        function = self.functions.pop(name, None)
        spec = importlib.util.find_spec(name) if function else None
        if function and spec and spec.loader:
            execute = spec.loader.exec_module

            def execute_and_call(module: ModuleType) -> None:
                execute(module)
                function(module)

            spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec


def watch() -> None:
    """Watch sources and devices in this process."""
    functions = {"fedfactory_ray.data.readers": watch_sources, "fedfactory_ray.cluster.devices": watch_devices}
    functions["fedfactory_ray.storage.files"] = watch_files
    sys.meta_path.insert(0, AfterImport(functions))  # type: ignore[arg-type]
