"""The client's actor: the only place where its images are read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import ray

from fedfactory_ray.data.partition import own_indices
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.seeds import derive_seed
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.places import WorkerResources
from fedfactory_ray.storage.files import Storage

if TYPE_CHECKING:
    import torch

    from fedfactory_ray.classification.fitting import Epoch
    from fedfactory_ray.data.source import Source
    from fedfactory_ray.federation.expert import Assignment, Expert

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Progress:
    """What a client tells while it trains: scalars."""

    client: str
    label: int
    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class Upload:
    """Announces that the next object of the stream is the weights of this card."""

    card: ModuleCard
    seconds: float
    node: str
    gpus: tuple[str, ...]


@ray.remote(max_restarts=0)
class ClientActor:
    """A slot for clients: pinned to its resources, it serves one client after the other."""

    def __init__(self, config: Config, resources: WorkerResources, storage: Storage) -> None:
        self.config, self.resources, self.storage = config, resources, storage
        self.sources: dict[str, Source] = {}
        self._device: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """The device that Ray assigned; found at the first use, for a refusal is lost in a constructor."""
        from fedfactory_ray.cluster.devices import assigned_device, prepare_process

        if self._device is None:
            self._device = prepare_process(self.resources, assigned_device(ray.get_gpu_ids()))
        return self._device

    def source(self, client: str) -> Source:
        """The client's images; of the sources the last one stays open."""
        from fedfactory_ray.data.readers import open_source

        data = self.config.data_of(client)
        if data.source not in self.sources:
            self.sources = {data.source: open_source(data)}
        return self.sources[data.source]

    def train(self, client: str, share: dict[int, np.ndarray]) -> Iterator[Progress | Upload | bytes]:
        """Train a module for each class of `share` (class → places in the client's training split).

        A stream of Progress; and for each module an Upload followed by its weights as bytes.
        """
        device, source = self.device, self.source(client)
        node, gpus = ray.get_runtime_context().get_node_id(), tuple(map(str, ray.get_gpu_ids()))
        for event in train_modules(self.config, source, client, share, device, self.storage):
            if isinstance(event, Progress):
                yield event
            else:
                card, weights, seconds = event
                yield Upload(card, seconds, node, gpus)
                yield weights

    def fit_expert(self, assignment: Assignment) -> Iterator[Epoch | Expert]:
        """Fit the client's expert, see `expert.fit_expert`: a stream of its epochs and, at the end, the expert."""
        from fedfactory_ray.federation.expert import fit_expert

        yield from fit_expert(self.config, assignment, self.source(assignment.client), self.storage, self.device)


def train_modules(
    config: Config,
    source: Source,
    client: str,
    share: dict[int, np.ndarray],
    device: torch.device,
    storage: Storage,
) -> Iterator[Progress | tuple[ModuleCard, bytes, float]]:
    """Train a client's modules where its images are; yields progress, and each module's card, weights and seconds.

    Each module is written to storage, the card last, so that it outlives this process; until then its latest
    checkpoint lies there, from which another process goes on.
    """
    import torch

    from fedfactory_ray.generation import module
    from fedfactory_ray.generation.training import TrainingStep, resolve_precision, train_denoiser

    generator = config.generator
    for label, places in share.items():
        began, last = time.monotonic(), None
        folder = f"modules/{client}/class-{label:03d}"
        images = torch.from_numpy(source.images("train", own_indices(config, source, label, places)))
        seed = derive_seed(config.seed, "train", client, label)
        checkpoint = storage.read(f"{folder}/{CHECKPOINT}") if storage.exists(f"{folder}/{CHECKPOINT}") else None
        for event in train_denoiser(images, generator, device, seed, checkpoint, config.storage.checkpoint_seconds):
            if isinstance(event, TrainingStep):
                last = event
                yield Progress(client, label, event.step, event.steps, event.loss)
            elif isinstance(event, bytes):
                storage.write(f"{folder}/{CHECKPOINT}", event)
            else:
                weights = module.pack(event, half=generator.half_precision_upload)
                channels, resolution, _ = event.image_shape
        if last is None:
            raise RuntimeError(f"client {client!r} trained no step for class {label}")
        card = ModuleCard(
            client=client,
            label=label,
            images=len(places),
            channels=channels,
            resolution=resolution,
            steps=last.steps,
            precision=resolve_precision(generator.precision, device),
            generator=generator.model_dump(mode="json"),
            sha256=module.digest(weights),
            size=len(weights),
        )
        storage.write(f"{card.folder}/model.safetensors", weights)
        storage.write(f"{card.folder}/card.json", card.to_json())
        storage.delete(f"{card.folder}/{CHECKPOINT}")
        yield card, weights, time.monotonic() - began
