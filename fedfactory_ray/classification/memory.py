"""What fitting a classifier takes of a GPU's memory, told before anything starts."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from fedfactory_ray.classification.models import make_classifier
from fedfactory_ray.cluster.gpus import Need
from fedfactory_ray.cluster.memory import training_need
from fedfactory_ray.data.source import Task
from fedfactory_ray.settings.sections import ClassifierConfig


@cache
def fit_need(recipe: ClassifierConfig, task: Task, precision: str) -> Need:
    """What a fit by `recipe` takes in `precision`; the images are those of a batch."""

    def loss(network: nn.Module, n: int) -> Tensor:
        logits = network(torch.zeros(n, task.channels, task.resolution, task.resolution))
        return nn.functional.cross_entropy(logits.float(), torch.zeros(n, dtype=torch.long))

    return training_need(lambda: make_classifier(recipe.model, task, recipe.norm), loss, precision)
