"""A client's side of a federated round, without Ray: the recipe's loss as a function of one flat parameter vector."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fedfactory_ray.baselines.interface import Gradient, Vectors
from fedfactory_ray.classification.augment import augment_batch
from fedfactory_ray.classification.models import make_classifier
from fedfactory_ray.cluster.devices import autocast, resolve_precision, seed_process
from fedfactory_ray.data.source import Task
from fedfactory_ray.data.transforms import to_tensor
from fedfactory_ray.seeds import derive_seed
from fedfactory_ray.settings.config import Config

VALIDATION_BATCH = 500


@dataclass(frozen=True)
class Images:
    """Some of a client's images, uint8 (n, H, W, C), and their labels, int64 (n,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Judgement:
    """Sums over validation images: loss, right answers, images; and by class, right answers with the classes alike, and
    images."""

    loss: float
    right: int
    n_images: int
    recalled: tuple[int, ...]
    held: tuple[int, ...]


def balanced_accuracy(judgements: Sequence[Judgement]) -> float:
    """Mean recall of the classes of which some client has a validation image."""
    recalled, held = (np.sum([getattr(j, name) for j in judgements], axis=0) for name in ("recalled", "held"))
    return float((recalled[held > 0] / held[held > 0]).mean())


def held_back(share: dict[int, np.ndarray], every: int) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Split a client's indices by class into those that train and those that validate: every `every`-th of a class, by
    its place. An index's side depends on its own client and class alone."""
    training, validation = {}, {}
    for label, indices in share.items():
        aside = np.arange(len(indices)) % every == every - 1
        training[label], validation[label] = indices[~aside], indices[aside]
    return training, validation


def to_message(vectors: Vectors) -> bytes:
    """Vectors as safetensors: what travels and what rests. No vectors, no bytes."""
    return safetensors.torch.save({k: v.cpu().contiguous() for k, v in vectors.items()}) if vectors else b""


def from_message(message: bytes, device: torch.device | str = "cpu") -> Vectors:
    """Inverse of `to_message`."""
    return {k: v.to(device) for k, v in safetensors.torch.load(message).items()} if message else {}


class Learner:
    """A network, the recipe's loss on given images, and its parameters as one vector.

    Buffers that are floats (the statistics of batch norms) make a second vector; they are averaged, not descended.
    """

    def __init__(self, config: Config, task: Task, device: torch.device) -> None:
        self.recipe, self.settings, self.device = config.classifier, config.federated, device
        self.precision = resolve_precision(self.recipe.precision, device)
        # The weights that the recipe's other fits start from.
        seed_process(derive_seed(config.seed, "classifier"))
        self.network = make_classifier(self.recipe.model, task, self.recipe.norm, self.recipe.flips).to(device)
        self.parameters = list(self.network.parameters())
        self.buffers = [buffer for buffer in self.network.buffers() if buffer.is_floating_point()]
        self.losses: list[Tensor] = []

    def model(self) -> Vectors:
        """Copies of the network's vectors: `weights`, and `buffers` if there are any."""
        vectors = {"weights": parameters_to_vector(self.parameters).detach().clone()}
        if self.buffers:
            vectors["buffers"] = torch.cat([buffer.flatten() for buffer in self.buffers])
        return vectors

    def load(self, model: Vectors) -> None:
        """Put the vectors of `model` into the network."""
        vector_to_parameters(model["weights"].clone(), self.parameters)
        if self.buffers:
            parts = model["buffers"].split([buffer.numel() for buffer in self.buffers])
            for buffer, part in zip(self.buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))

    def gradients(self, data: Images, seed: int) -> Iterator[Gradient]:
        """One gradient for each batch of a client's round: shuffled anew each epoch, in equal batches."""
        torch.manual_seed(seed)
        draw = torch.Generator(self.device).manual_seed(seed)
        shuffle = torch.Generator().manual_seed(seed)
        self.losses = []
        self.network.train()
        batches = math.ceil(len(data.labels) / self.recipe.batch_size)
        for _ in range(self.settings.local_epochs):
            for chosen in torch.randperm(len(data.labels), generator=shuffle).tensor_split(batches):
                inputs = augment_batch(to_tensor(data.images[chosen], self.device), self.recipe, draw)
                yield lambda w, x=inputs, y=data.labels[chosen]: self._gradient(w, x, y)  # type: ignore[misc]

    def _gradient(self, weights: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        vector_to_parameters(weights, self.parameters)
        with autocast(self.device, self.precision):
            logits = self.network(inputs)
        loss = nn.functional.cross_entropy(
            logits.float(), labels.to(self.device), label_smoothing=self.recipe.label_smoothing
        )
        self.losses.append(loss.detach())
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, self.parameters)])
        gradient.add_(weights, alpha=self.settings.weight_decay)
        return gradient.mul_((self.settings.grad_clip / (gradient.norm() + 1e-12)).clamp(max=1))

    @property
    def mean_loss(self) -> float:
        """Mean loss of the batches since `gradients` was called."""
        return float(torch.stack(self.losses).mean())

    @torch.inference_mode()
    def judge(self, data: Images, prior: np.ndarray) -> Judgement:
        """Judge the network, as it is, on validation images; `prior`, (classes,), is that of all training images."""
        self.network.eval()
        loss, right, logarithm = 0.0, 0, torch.from_numpy(np.log(prior)).float()
        recalled = torch.zeros(len(prior), dtype=torch.long)
        for start in range(0, len(data.labels), VALIDATION_BATCH):
            labels = data.labels[start : start + VALIDATION_BATCH]
            with autocast(self.device, self.precision):
                logits = self.network(to_tensor(data.images[start : start + VALIDATION_BATCH], self.device))
            logits = logits.float().cpu()
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(1) == labels).sum())
            alike = (logits - logarithm).argmax(1)
            recalled += torch.bincount(labels[alike == labels], minlength=len(prior))
        held = torch.bincount(data.labels, minlength=len(prior))
        return Judgement(loss, right, len(data.labels), tuple(recalled.tolist()), tuple(held.tolist()))
