"""What the tests' Ray workers do before anything else: note who opens which file, and take the CPU for a GPU.

A test names `hooks.watch` as Ray's worker_process_setup_hook and sets HOOK_LOG for the cluster's processes.
"""

from __future__ import annotations

import json
import os
from typing import Any


def note(**facts: Any) -> None:
    """Append a line to the log."""
    import ray

    line = json.dumps({"node": ray.get_runtime_context().get_node_id(), "pid": os.getpid(), **facts}) + "\n"
    with open(os.environ["HOOK_LOG"], "a") as log:
        log.write(line)


def watch() -> None:
    """Watch sources and devices in this process."""
    import torch

    from fedfactory_ray import devices
    from fedfactory_ray.data.sources import ArrayFile

    read = ArrayFile._read

    def watched_read(self: ArrayFile, *arguments: Any) -> Any:
        note(opened=self.path, key=arguments[0])
        return read(self, *arguments)

    def watched_device(gpu_ids: list[int] | list[str]) -> torch.device:
        note(gpus=list(map(str, gpu_ids)), visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
        return torch.device("cpu")

    ArrayFile._read = watched_read  # type: ignore[method-assign]
    devices.assigned_device = watched_device
