"""Predicting the real test split: the one place that reads it, once, after everything has been chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import ray
import safetensors.torch
import torch

from fedfactory_ray.classification.evaluation import Evaluation, evaluate
from fedfactory_ray.classification.models import Task, make_classifier
from fedfactory_ray.config import Config
from fedfactory_ray.data.sources import open_source
from fedfactory_ray.data.transforms import to_tensor
from fedfactory_ray.devices import assigned_device, prepare_process
from fedfactory_ray.sections import WorkerResources
from fedfactory_ray.storage import Storage

BATCH_SIZE = 500


@dataclass(frozen=True)
class TestResult:
    """Evaluations by classifier, and for pictures a few test images by class, uint8 (n, H, W, C)."""

    evaluations: dict[str, Evaluation]
    examples: dict[int, np.ndarray]
    probabilities: np.ndarray


def load_network(config: Config, task: Task, storage: Storage, folder: str) -> torch.nn.Module:
    """The fitted network of a classifier in storage, in evaluation mode, on the CPU."""
    network = make_classifier(config.classifier.model, task, config.classifier.norm)
    network.load_state_dict(safetensors.torch.load(storage.read(f"{folder}/model.safetensors")))
    return network.eval()


@torch.inference_mode()
def predict(network: torch.nn.Module, images: np.ndarray, device: torch.device) -> np.ndarray:
    """Probabilities float32 (n, classes) of uint8 images (n, H, W, C), computed in float32."""
    network.to(device)
    batches = [images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE)]
    return torch.cat([network(to_tensor(batch, device)).float().softmax(1).cpu() for batch in batches]).numpy()


@ray.remote(max_retries=2)
def evaluate_on_test(
    config: Config,
    task: Task,
    resources: WorkerResources,
    storage: Storage,
    folders: dict[str, str],
    examples: int,
    ensembles: dict[str, list[str]] | None = None,
) -> TestResult:
    """Evaluate the classifiers in `folders` (name → folder) on the test split, with up to `examples` images a class.

    `ensembles` (name → names in `folders`) are evaluated beside them: the mean of their members' probabilities. The
    probabilities that come back are those of the first classifier on the examples, in the order of their classes.
    """
    device = prepare_process(resources, assigned_device(ray.get_gpu_ids()))
    source = open_source(config.data)
    images, labels = source.images("test"), source.labels("test")
    networks = {name: load_network(config, task, storage, folder) for name, folder in folders.items()}
    shown = {y: images[np.flatnonzero(labels == y)[:examples]] for y in range(task.classes)}
    predicted = {name: predict(network, images, device) for name, network in networks.items()}
    for name, members in (ensembles or {}).items():
        predicted[name] = np.mean([predicted[member] for member in members], axis=0)
    return TestResult(
        {name: evaluate(probabilities, labels, config.seed) for name, probabilities in predicted.items()},
        shown,
        predict(next(iter(networks.values())), np.concatenate(list(shown.values())), device),
    )
