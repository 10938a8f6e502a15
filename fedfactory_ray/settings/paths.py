"""Paths as people type them: relative to the folder in which the command was typed, not to a worker's."""

from __future__ import annotations

import os
from typing import Any

from fedfactory_ray.settings.config import Config, merge, nested
from fedfactory_ray.settings.data import is_named

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that `ray job submit` sets for the job's driver."""


def is_relative(path: str) -> bool:
    """Whether `path` depends on the folder of the process that opens it: neither absolute, nor below a home (`~`), nor
    an address (`s3://…`), nor a data set's name (`digits`, `medmnist:bloodmnist`)."""
    return not (is_named(path) or "://" in path or path.startswith("~") or os.path.isabs(path))


def located(config: Config) -> Config:
    """`config` with its relative paths made absolute from this process's folder, which it notes as `config.folder` if
    one of them tells what the run is about: its name and settings go on as they were typed."""
    here = os.getcwd()
    images = [config.data.source, *(silo.source for silo in config.partition.silos)]
    if config.modules is not None:
        images.append(config.modules)
    if not any(map(is_relative, [*images, config.data.root])):
        return config

    def at(path: str) -> str:
        # As typed behind the folder, `../` and all, so that the folder can be taken away again.
        return os.path.join(here, path) if is_relative(path) else path

    tree = config.model_dump()
    changes: dict[str, Any] = {
        "data.source": at(config.data.source),
        "data.root": at(config.data.root),
        "partition.silos": [silo | {"source": at(silo["source"])} for silo in tree["partition"]["silos"]],
        "modules": config.modules and at(config.modules),
        "folder": here if any(map(is_relative, images)) else config.folder,
        "take_over": config.take_over,
    }
    return Config.model_validate(merge(tree, nested(changes)))
