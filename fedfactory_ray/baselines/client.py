"""The actors of the federated baselines: clients, who alone read their images, and the server, who reads none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import ray
import safetensors.torch
import torch

from fedfactory_ray.baselines.interface import Method, Update, train_locally, weighted_mean
from fedfactory_ray.baselines.learner import Images, Judgement, Learner, held_back, pack, unpack
from fedfactory_ray.classification.batches import HeldBatches
from fedfactory_ray.classification.fitting import Fit
from fedfactory_ray.cluster.devices import assigned_device, prepare_process
from fedfactory_ray.data.partition import own_indices
from fedfactory_ray.data.readers import open_source
from fedfactory_ray.data.source import Source, Task
from fedfactory_ray.seeds import derive_seed
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.places import WorkerResources
from fedfactory_ray.settings.sections import ClassifierConfig
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.synthesis.shard import image_table

RESTARTS = 2


@dataclass(frozen=True)
class Trained:
    """What a client tells of its part in a round: scalars."""

    images: int
    loss: float
    bytes_up: int


@dataclass(frozen=True)
class Alone:
    """A client's own classifier in storage."""

    client: str
    folder: str
    sha256: str
    epoch: int


@dataclass(frozen=True)
class Sizes:
    """Bytes of the server's messages."""

    model: int
    extras: int


# The default strategy, else it waits for room in the placement group of a tuner's trial.
@ray.remote(max_restarts=RESTARTS, max_task_retries=RESTARTS, scheduling_strategy="DEFAULT")
class FederatedClient:
    """A slot for the clients in `shares` (client → class → indices), with the same resources as a factory's client.

    It keeps their images, never their vectors: calls are functions of their arguments, so that Ray may repeat one.
    """

    def __init__(
        self, config: Config, task: Task, resources: WorkerResources, shares: dict[str, dict[int, np.ndarray]]
    ) -> None:
        self.config, self.task, self.resources, self.shares = config, task, resources, shares
        self.kept: dict[str, tuple[Images, Images]] = {}
        self._learner: Learner | None = None
        self._sources: dict[str, Source] = {}

    @property
    def learner(self) -> Learner:
        """The network, on the device that Ray assigned; made at the first use: constructors lose refusals."""
        if self._learner is None:
            device = prepare_process(self.resources, assigned_device(ray.get_gpu_ids()))
            self._learner = Learner(self.config, self.task, device)
        return self._learner

    def source(self, client: str) -> Source:
        """Where the client's images are."""
        data = self.config.data_of(client)
        if data.source not in self._sources:
            self._sources[data.source] = open_source(data)
        return self._sources[data.source]

    def images(self, client: str) -> tuple[Images, Images]:
        """The client's images that train, and those that validate."""
        if client not in self.kept:
            sides = held_back(self.shares[client], self.config.federated.validation_every)
            self.kept[client] = (self._read(client, sides[0]), self._read(client, sides[1]))
        return self.kept[client]

    def _read(self, client: str, share: dict[int, np.ndarray]) -> Images:
        source = self.source(client)
        indices = [own_indices(self.config, source, label, share[label]) for label in sorted(share)]
        labels = np.repeat(sorted(share), [len(each) for each in indices])
        images = source.images("train", np.concatenate(indices))
        return Images(torch.from_numpy(images), torch.from_numpy(labels).long())

    def train(
        self, client: str, method: Method, round_: int, model: bytes, extras: bytes, state: bytes | None
    ) -> tuple[Trained, bytes, bytes]:
        """The client's part of a round: returns scalars, its upload, and its state, which is for its next round."""
        training, _ = self.images(client)
        received = unpack(model, self.learner.device) | unpack(extras, self.learner.device)
        old = method.start_client(received["weights"]) if state is None else unpack(state, self.learner.device)
        self.learner.load(received)
        seed = derive_seed(self.config.seed, "federated", client, round_)
        gradients = self.learner.gradients(training, seed)
        vectors, new = train_locally(method, received, old, gradients, method.client_lr)
        if self.learner.buffers:
            vectors = vectors | {"buffers": self.learner.model()["buffers"]}
        upload = pack(vectors)
        return Trained(len(training.labels), self.learner.mean_loss, len(upload)), upload, pack(new)

    def validate(self, client: str, model: bytes) -> Judgement:
        """Judge the server's model on the client's validation images; scalars alone come back."""
        self.learner.load(unpack(model, self.learner.device))
        return self.learner.judge(self.images(client)[1])

    def fit_alone(self, client: str, recipe: ClassifierConfig, storage: Storage, fingerprint: str) -> Alone:
        """Fit a classifier on the client's own images by `recipe` and write it to storage, the card last.

        The epoch is chosen by the client's validation images; one too small to hold any back is judged on its
        training images.
        """
        training, validation = self.images(client)
        seed = derive_seed(self.config.seed, "classifier")
        tables = [
            image_table(side.images.numpy(), side.labels.numpy(), client)
            for side in (training, validation if len(validation.labels) else training)
        ]
        sides = [HeldBatches(table, self.task.image_shape, recipe.batch_size, seed, 0, 1) for table in tables]
        steps = len(training.labels) // min(recipe.batch_size, len(training.labels))
        fit = Fit(recipe, self.task, steps, seed, self.learner.device)
        for _ in fit.epochs(*sides):
            pass
        if fit.best is None:
            raise RuntimeError(f"client {client!r} fitted no epoch")
        folder = f"classifier/local-{client}"
        storage.write(f"{folder}/model.safetensors", safetensors.torch.save(fit.best_weights))
        sha256 = storage.sha256(f"{folder}/model.safetensors")
        card = {"fingerprint": fingerprint, "sha256": sha256, "epoch": fit.best.epoch, "epochs": recipe.epochs}
        storage.write_json(f"{folder}/card.json", card)
        return Alone(client, folder, sha256, fit.best.epoch)

    def save_state(self, storage: Storage, file: str, state: bytes) -> None:
        """Write a client's state to a checkpoint."""
        storage.write(file, state)

    def load_state(self, storage: Storage, file: str) -> bytes:
        """Read a client's state from a checkpoint."""
        return storage.read(file)


@ray.remote(num_cpus=0, max_restarts=RESTARTS, max_task_retries=RESTARTS)
class Server:
    """Aggregates. Its vectors lie in the object store between calls, which are functions of their arguments."""

    def __init__(self, config: Config, task: Task) -> None:
        self.learner = Learner(config, task, prepare_process(WorkerResources(), torch.device("cpu")))
        self.first = self.learner.model()

    def start(self, method: Method) -> tuple[Sizes, bytes, bytes, bytes]:
        """Before the first round. Returns sizes, and messages: the model, its extras, and what the server keeps."""
        return self._messages(method, self.first | method.start_server(self.first["weights"]))

    def aggregate(
        self, method: Method, images: int, counts: list[int], model: bytes, kept: bytes, *uploads: bytes
    ) -> tuple[Sizes, bytes, bytes, bytes]:
        """After a round, given the participants' image counts and uploads in order, and the count of all images."""
        updates = [Update(n, unpack(upload)) for n, upload in zip(counts, uploads, strict=True)]
        server = unpack(model) | unpack(kept)
        after = method.aggregate(server, updates, images)
        if "buffers" in server:
            after = after | {"buffers": weighted_mean(updates, "buffers")}
        return self._messages(method, after)

    def _messages(self, method: Method, server: dict[str, torch.Tensor]) -> tuple[Sizes, bytes, bytes, bytes]:
        model = pack({k: v for k, v in server.items() if k in self.first})
        kept = pack({k: v for k, v in server.items() if k not in self.first})
        extras = pack(method.extras(server))
        return Sizes(len(model), len(extras)), model, extras, kept

    def save(self, storage: Storage, files: list[str], *messages: bytes) -> None:
        """Write messages to a checkpoint."""
        for file, message in zip(files, messages, strict=True):
            storage.write(file, message)

    def load(self, storage: Storage, files: list[str]) -> tuple[bytes, ...]:
        """Read messages from a checkpoint."""
        return tuple(storage.read(file) for file in files)

    def export(self, storage: Storage, file: str, model: bytes) -> str:
        """Write a model as a classifier's weights (state dict, safetensors); returns its SHA-256."""
        self.learner.load(unpack(model))
        state = {k: v.detach().clone().contiguous() for k, v in self.learner.network.state_dict().items()}
        storage.write(file, safetensors.torch.save(state))
        return storage.sha256(file)
