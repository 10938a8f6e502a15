"""The client's actor: the only place where its images are read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import ray

from fedfactory_ray.config import Config
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.sections import WorkerResources
from fedfactory_ray.seeds import derive_seed
from fedfactory_ray.storage import Storage

if TYPE_CHECKING:
    from fedfactory_ray.classification.fitting import Epoch
    from fedfactory_ray.federation.expert import Assignment, Expert


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
    device: str


@ray.remote(max_restarts=0)
class ClientActor:
    """A slot for clients: pinned to its resources, it serves one client after the other."""

    def __init__(self, config: Config, resources: WorkerResources, storage: Storage) -> None:
        from fedfactory_ray.data.sources import open_source
        from fedfactory_ray.devices import assigned_device, prepare_process

        self.config, self.storage = config, storage
        self.device = prepare_process(resources, assigned_device(ray.get_gpu_ids()))
        self.source = open_source(config.data)

    def train(self, client: str, share: dict[int, np.ndarray]) -> Iterator[Progress | Upload | bytes]:
        """Train a module for each class of `share` (class → indices into the training split).

        A stream of Progress; and for each module an Upload followed by its weights as bytes. Each module is also
        written to storage, the card last, so that it outlives this process.
        """
        import torch

        from fedfactory_ray.generation import module
        from fedfactory_ray.generation.training import TrainingStep, resolve_precision, train_denoiser

        for label, indices in share.items():
            began, last = time.monotonic(), None
            images = torch.from_numpy(self.source.images("train", indices))
            seed = derive_seed(self.config.seed, "train", client, label)
            for event in train_denoiser(images, self.config.generator, self.device, seed):
                if isinstance(event, TrainingStep):
                    last = event
                    yield Progress(client, label, event.step, event.steps, event.loss)
                    continue
                weights = module.pack(event, half=self.config.generator.half_precision_upload)
                channels, resolution, _ = event.image_shape
            if last is None:
                raise RuntimeError(f"client {client!r} trained no step for class {label}")
            card = ModuleCard(
                client=client,
                label=label,
                images=len(indices),
                channels=channels,
                resolution=resolution,
                steps=last.steps,
                precision=resolve_precision(self.config.generator.precision, self.device),
                generator=self.config.generator.model_dump(mode="json"),
                sha256=module.digest(weights),
                size=len(weights),
            )
            self.storage.write(f"{card.folder}/model.safetensors", weights)
            self.storage.write(f"{card.folder}/card.json", card.to_json())
            yield Upload(card, time.monotonic() - began, str(self.device))
            yield weights

    def fit_expert(self, assignment: Assignment) -> Iterator[Epoch | Expert]:
        """Fit the client's expert, see `expert.fit_expert`: a stream of its epochs and, at the end, the expert."""
        from fedfactory_ray.federation.expert import fit_expert

        yield from fit_expert(self.config, assignment, self.source, self.storage, self.device)
