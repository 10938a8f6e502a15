"""Centralised training: the same classifier on all real training images, the upper bound that breaks the silos."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pyarrow as pa
import ray

from fedfactory_ray.classification.rows import Rows
from fedfactory_ray.classification.sides import validates
from fedfactory_ray.data.partition import Partition
from fedfactory_ray.data.readers import open_source
from fedfactory_ray.data.source import DataInfo
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.sections import ClassifierConfig
from fedfactory_ray.storage.artefact import fingerprint
from fedfactory_ray.synthesis.shard import image_table

BLOCK_BYTES = 64 * 2**20


def baseline_steps(config: Config, partition: Partition) -> int:
    """Give baselines at least as many optimiser steps as the factory's classifier: the recipe's epochs over the larger
    of the two sets, real or synthetic."""
    recipe, offered = config.classifier, partition.offered(config.generator.min_images)
    drawn = config.synthesis.images_per_class * len({label for _, label, _ in offered})
    held = sum(len(share) for _, _, share in partition)
    n_images = int(max(drawn, held) * (1 - recipe.validation_fraction))
    return recipe.epochs * max(1, n_images // recipe.batch_size)


def for_steps(recipe: ClassifierConfig, n_images: int, steps: int) -> ClassifierConfig:
    """The recipe with as many epochs as `steps` optimiser steps take on `n_images` training images, rounded up."""
    return recipe.model_copy(update={"epochs": math.ceil(steps / max(1, n_images // recipe.batch_size))})


def reference_config(config: Config, partition: Partition) -> Config:
    """`config` with the epochs of the centralised fit."""
    recipe = config.classifier
    n_images = int(sum(len(share) for _, _, share in partition) * (1 - recipe.validation_fraction))
    longer = for_steps(recipe, n_images, baseline_steps(config, partition))
    return config.model_copy(update={"classifier": longer})


def real_rows(config: Config, partition: Partition, info: DataInfo) -> Rows:
    """All images of the partition as a classifier's rows, which workers or tasks read, never the driver."""
    indices = np.sort(np.concatenate([share for _, _, share in partition]))
    digest = fingerprint("real", info.class_names, info.resolution, info.channels, partition.content)
    blocks = math.ceil(len(indices) * info.channels * info.resolution**2 / BLOCK_BYTES)
    table, dataset = partial(_read, config, indices), partial(_stream, config, indices, blocks)
    return Rows(table, dataset, digest, len(indices), len(indices))


def real_validation_rows(config: Config, partition: Partition) -> Callable[[], pa.Table]:
    """Reads the images of the partition that validate, where it is called."""
    indices = np.sort(np.concatenate([share for _, _, share in partition]))
    judged = validates(np.arange(len(indices)), config.classifier.validation_fraction)
    return partial(_read, config, indices[judged])


def _read(config: Config, indices: np.ndarray, start: int = 0) -> pa.Table:
    """The images at `indices`, in places from `start`."""
    source = open_source(config.data)
    return image_table(source.images("train", indices), source.labels("train")[indices], "real", start)


def _stream(config: Config, indices: np.ndarray, blocks: int) -> ray.data.Dataset:
    """The same as a data set of so many blocks."""
    # The default strategy, else they wait for room in the placement group of a tuner's trial.
    read = ray.remote(scheduling_strategy="DEFAULT")(_read)
    parts = np.array_split(indices, blocks)
    starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
    return ray.data.from_arrow_refs(
        [read.remote(config, part, int(start)) for part, start in zip(parts, starts, strict=True)]
    )
