"""Predicting the real test split: the one place that reads it, once, after everything has been chosen."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np
import ray
import safetensors.torch
import torch
from scipy.special import softmax

from fedfactory_ray.classification.ensemble import mixture, product
from fedfactory_ray.classification.evaluation import Difference, Evaluation, evaluate, paired_difference
from fedfactory_ray.classification.models import make_classifier
from fedfactory_ray.cluster.devices import assigned_device, prepare_process
from fedfactory_ray.cluster.environment import environment
from fedfactory_ray.cluster.failures import failures_refused
from fedfactory_ray.data.readers import open_source
from fedfactory_ray.data.source import Task
from fedfactory_ray.data.transforms import to_tensor
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import MIXTURE, PRODUCT, WEIGHTS

BATCH_SIZE = 500
REMEDY = "resources.classifier.num_gpus=1, should others share the GPU, or 0 to use the CPU"


@dataclass(frozen=True)
class TestResult:
    """All that is read off the test split, once."""

    evaluations: dict[str, Evaluation]
    """By classifier, and of the experts together."""
    experts: dict[str, Evaluation]
    """Of each expert alone, by client."""
    differences: dict[str, Difference]
    """What the product of experts gains on each classifier."""
    digests: dict[str, str]
    """SHA-256 of all predicted probabilities (float32) by evaluation."""
    examples: dict[int, np.ndarray]
    """Some test images by class, uint8 (n, H, W, C), for pictures."""
    environment: dict[str, str] = field(default_factory=dict)
    """Hardware and versions that predicted."""


def load_network(config: Config, task: Task, storage: Storage, folder: str) -> torch.nn.Module:
    """The fitted network of a classifier in storage, in evaluation mode, on the CPU."""
    recipe = config.classifier
    network = make_classifier(recipe.model, task, recipe.norm, recipe.flips)
    network.load_state_dict(safetensors.torch.load(storage.read(f"{folder}/{WEIGHTS}")))
    return network.eval()


@torch.inference_mode()
def predict_logits(network: torch.nn.Module, images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Logits float32 (n, classes), on the CPU, of uint8 images (n, H, W, C), computed in float32."""
    network.to(device)
    batches = [images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE)]
    return torch.cat([network(to_tensor(batch, device)).float() for batch in batches]).cpu()


@ray.remote
def evaluate_on_test(
    config: Config,
    task: Task,
    threads: int,
    storage: Storage,
    folders: dict[str, str],
    experts: dict[str, str],
    examples: int,
    ensembles: dict[str, list[str]] | None = None,
) -> TestResult:
    """Evaluate classifiers and experts (name → folder) on the test split; up to `examples` images a class come back.

    Experts count each alone, as a mixture and as a product; the product is compared with every classifier. `ensembles`
    (name → names in `folders`) are evaluated beside the classifiers: the mean of their members' probabilities.
    """
    device = prepare_process(threads, assigned_device(ray.get_gpu_ids()))
    source = open_source(config.data)
    images, labels = source.images("test"), source.labels("test")

    def predict(name: str, folder: str) -> torch.Tensor:
        with failures_refused(f"evaluating {name}", REMEDY):
            return predict_logits(load_network(config, task, storage, folder), images, device)

    found, lone = ({name: predict(name, folder) for name, folder in of.items()} for of in (folders, experts))
    shown = {y: images[labels == y][:examples] for y in range(task.classes)}
    result = score(found, lone, ensembles or {}, labels, config.seed, shown)
    return replace(result, environment=environment(device))


def score(
    classifiers: dict[str, torch.Tensor],
    experts: dict[str, torch.Tensor],
    ensembles: dict[str, list[str]],
    labels: np.ndarray,
    seed: int,
    examples: dict[int, np.ndarray],
) -> TestResult:
    """Evaluate the logits (n, classes) of classifiers and, alone and combined, of experts against labels (n,)."""
    found = {name: logits.numpy() for name, logits in classifiers.items()}
    for name, members in ensembles.items():
        found[name] = mixture(torch.stack([classifiers[member] for member in members])).numpy()
    differences = {}
    if experts:
        logits = torch.stack([*experts.values()])
        combined = {PRODUCT: product(logits).numpy(), MIXTURE: mixture(logits).numpy()}
        differences = {name: paired_difference(combined[PRODUCT], other, labels, seed) for name, other in found.items()}
        found |= combined
    return TestResult(
        {name: evaluate(each, labels, seed) for name, each in found.items()},
        {client: evaluate(logits.numpy(), labels, seed) for client, logits in experts.items()},
        differences,
        {name: probabilities_sha256(each) for name, each in found.items()},
        examples,
    )


def probabilities_sha256(logits: np.ndarray) -> str:
    """SHA-256 of the probabilities, float32 (n, classes), of log-probabilities up to a constant an image."""
    return hashlib.sha256(softmax(logits.astype(np.float64), axis=1).astype("<f4").tobytes()).hexdigest()
