"""Predicting the real test split: the one place that reads it, once, after everything has been chosen."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import ray
import safetensors.torch
import torch
from scipy.special import softmax

from fedfactory_ray.classification.batches import ORDER
from fedfactory_ray.classification.calibration import fit_temperature
from fedfactory_ray.classification.ensemble import mixture, product
from fedfactory_ray.classification.evaluation import Difference, Judged, judge, paired_difference
from fedfactory_ray.classification.models import make_classifier
from fedfactory_ray.classification.rules import ALIKE, ANNOUNCED, Ruled, prior_of
from fedfactory_ray.cluster.devices import assigned_device, prepare_process
from fedfactory_ray.cluster.environment import environment
from fedfactory_ray.cluster.failures import failures_refused
from fedfactory_ray.data.readers import open_source
from fedfactory_ray.data.source import Task
from fedfactory_ray.data.transforms import to_tensor
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import METHOD, MIXTURE, PRODUCT, WEIGHTS
from fedfactory_ray.synthesis.shard import images_of

BATCH_SIZE = 500
REMEDY = "resources.classifier.num_gpus=1, should others share the GPU, or 0 to use the CPU"


@dataclass(frozen=True)
class Entry:
    """A classifier to be evaluated: its folder in storage; the image counts by class, (classes,), that it was trained
    on, None where all were alike; and what reads the rows that calibrate it, if it is to be calibrated."""

    folder: str
    counts: np.ndarray | None = None
    validation: Callable[[], pa.Table] | None = None


@dataclass(frozen=True)
class TestResult:
    """All that is read off the test split, once."""

    evaluations: dict[str, Judged]
    """By classifier, and of the experts together."""
    experts: dict[str, Judged]
    """Of each expert alone, by client, as it is."""
    differences: dict[str, dict[str, Difference]]
    """What the product of experts, and Architecture I's classifier, gain on each other classifier."""
    prior: np.ndarray
    """The announced one, float64 (classes,)."""
    digests: dict[str, str]
    """SHA-256 of all predicted probabilities (float32) by evaluation, before calibration and prior; of the product with
    weights 1, as earlier versions told them."""
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
    counts: np.ndarray,
    entries: dict[str, Entry],
    experts: dict[str, str],
    validation: Callable[[], pa.Table] | None,
    examples: int,
    ensembles: dict[str, list[str]] | None = None,
) -> TestResult:
    """Evaluate classifiers and experts (client → folder) on the test split; up to `examples` images a class come back.

    Before it is read, temperatures are fitted on each entry's rows, and on those of `validation` for the experts
    together. The prior is that of `counts`, int (classes,), which the clients declare: the test split's is
    assumed to be like it, never looked at. Experts count each alone, as a mixture and as a product; the product is
    compared with every classifier. `ensembles` (name → names of entries) are evaluated beside the classifiers: the mean
    of their members' probabilities under each rule.
    """
    device = prepare_process(threads, assigned_device(ray.get_gpu_ids()))

    def predict(folder: str, images: np.ndarray) -> torch.Tensor:
        with failures_refused(f"evaluating {folder}", REMEDY):
            return predict_logits(load_network(config, task, storage, folder), images, device)

    temperatures = _fit_temperatures(predict, entries, experts, validation, task.image_shape)
    source = open_source(config.data)
    images, labels = source.images("test"), source.labels("test")
    result = score(
        {name: predict(entry.folder, images) for name, entry in entries.items()},
        {client: predict(folder, images) for client, folder in experts.items()},
        ensembles or {},
        labels,
        prior_of(counts),
        {name: prior_of(entry.counts) for name, entry in entries.items() if entry.counts is not None},
        temperatures,
        {y: images[labels == y][:examples] for y in range(task.classes)},
    )
    return replace(result, environment=environment(device))


def _fit_temperatures(
    predict: Callable[[str, np.ndarray], torch.Tensor],
    entries: dict[str, Entry],
    experts: dict[str, str],
    validation: Callable[[], pa.Table] | None,
    shape: tuple[int, int, int],
) -> dict[str, float]:
    """By evaluation, the temperatures of what is to be calibrated; `predict` gives the logits of a folder's network."""
    found: dict[str, float] = {}
    for name, entry in entries.items():
        if entry.validation is not None:
            images, labels = _in_order(entry.validation(), shape)
            found[name] = fit_temperature(predict(entry.folder, images).numpy(), labels)
    if experts and validation is not None:
        images, labels = _in_order(validation(), shape)
        logits = torch.stack([predict(folder, images) for folder in experts.values()])
        found |= {name: fit_temperature(combine(logits).numpy(), labels) for name, combine in POOLS.items()}
    return found


def _in_order(table: pa.Table, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 (n, H, W, C), and labels, int64 (n,), of rows, in one order however they came."""
    table = table.sort_by([(name, "ascending") for name in ORDER])
    return images_of(table, shape), table["label"].to_numpy().astype(np.int64)


POOLS = {PRODUCT: product, MIXTURE: mixture}
"""How experts are combined."""


def score(
    classifiers: dict[str, torch.Tensor],
    experts: dict[str, torch.Tensor],
    ensembles: dict[str, list[str]],
    labels: np.ndarray,
    prior: np.ndarray,
    trained_on: dict[str, np.ndarray],
    temperatures: dict[str, float],
    examples: dict[int, np.ndarray],
) -> TestResult:
    """Evaluate the logits (n, classes) of classifiers and, alone and combined, of experts against labels (n,), given
    the announced `prior` and, by classifier, the prior of its training images where the classes were not alike."""
    found = {name: logits.numpy() for name, logits in classifiers.items()}
    raw = {name: Ruled.of(logits, prior, trained_on.get(name)) for name, logits in found.items()}
    ruled = {
        name: Ruled.of(logits / temperatures.get(name, 1.0), prior, trained_on.get(name))
        for name, logits in found.items()
    }
    for name, members in ensembles.items():
        found[name] = mixture(torch.stack([classifiers[member] for member in members])).numpy()
        sides = (torch.from_numpy(np.stack([getattr(raw[m], rule) for m in members])) for rule in (ALIKE, ANNOUNCED))
        raw[name] = ruled[name] = Ruled(*(mixture(side).numpy() for side in sides))
    classified = list(ruled)
    if experts:
        logits = torch.stack([*experts.values()])
        pooled = {name: combine(logits).numpy() for name, combine in POOLS.items()}
        together = {name: Ruled.of(each / temperatures.get(name, 1.0), prior) for name, each in pooled.items()}
        found |= {PRODUCT: product(logits, torch.ones(len(logits))).numpy(), MIXTURE: pooled[MIXTURE]}
        raw |= {name: Ruled.of(found[name], prior) for name in POOLS}
        ruled |= together
    differences = {
        ours: {name: paired_difference(ruled[ours], ruled[name], labels) for name in classified if name != ours}
        for ours in (PRODUCT, METHOD)
        if ours in ruled and classified not in ([], [ours])
    }
    lone = {client: Ruled.of(each.numpy(), prior) for client, each in experts.items()}
    return TestResult(
        {name: judge(each, raw[name], labels, temperatures.get(name, 1.0)) for name, each in ruled.items()},
        {client: judge(each, each, labels) for client, each in lone.items()},
        differences,
        prior,
        {name: probabilities_sha256(each) for name, each in found.items()},
        examples,
    )


def probabilities_sha256(logits: np.ndarray) -> str:
    """SHA-256 of the probabilities, float32 (n, classes), of log-probabilities up to a constant an image."""
    return hashlib.sha256(softmax(logits.astype(np.float64), axis=1).astype("<f4").tobytes()).hexdigest()
