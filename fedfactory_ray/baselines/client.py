"""The actors of the federated baselines: clients, who alone read their images, and the server, who reads none."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import safetensors.torch
import torch

from fedfactory_ray.baselines.card import Alone
from fedfactory_ray.baselines.interface import Method, Update, train_locally, weighted_mean
from fedfactory_ray.baselines.learner import Images, Judgement, Learner, from_message, held_back, to_message
from fedfactory_ray.classification.batches import HeldBatches
from fedfactory_ray.classification.fitting import Fit
from fedfactory_ray.cluster.devices import prepare_process
from fedfactory_ray.cluster.failures import failures_refused
from fedfactory_ray.data.partition import own_indices
from fedfactory_ray.data.source import Task
from fedfactory_ray.federation.client import FIT_REMEDY, ClientSlot
from fedfactory_ray.seeds import derive_seed
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.sections import ClassifierConfig
from fedfactory_ray.storage.artefact import keep
from fedfactory_ray.storage.checkpoints import Checkpoint, Checkpoints
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import WEIGHTS, classifier_folder, lone_classifier
from fedfactory_ray.synthesis.shard import image_table


@dataclass(frozen=True)
class Trained:
    """What a client tells of its part in a round: scalars."""

    n_images: int
    loss: float
    bytes_up: int


@dataclass(frozen=True)
class MessageBytes:
    """Bytes of the server's messages."""

    model: int
    extras: int


class Keeper:
    """An actor that writes and reads the messages of a checkpoint, which so never pass through the driver."""

    def newest(self, checkpoints: Checkpoints) -> Checkpoint | None:
        """The newest whole checkpoint: its card alone."""
        return checkpoints.newest()

    def save(self, storage: Storage, file: str, message: bytes) -> str:
        """Write a message; returns the file's SHA-256."""
        return storage.write(file, message)

    def load(self, storage: Storage, file: str) -> bytes:
        """Read a message."""
        return storage.read(file)


class FederatedClient(Keeper, ClientSlot):
    """A slot for the clients in `shares` (client → class → indices), with the same resources as a factory's client.
    `prior`, (classes,), is that of all clients' images.

    It keeps their images, never their vectors: calls are functions of their arguments, so that Ray may repeat one.
    """

    def __init__(
        self, config: Config, task: Task, threads: int, shares: dict[str, dict[int, np.ndarray]], prior: np.ndarray
    ) -> None:
        super().__init__(config, threads)
        self.task, self.shares, self.prior = task, shares, prior
        self.kept: dict[str, tuple[Images, Images]] = {}

    @cached_property
    def learner(self) -> Learner:
        """The network, on the slot's device."""
        return Learner(self.config, self.task, self.device)

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
        with failures_refused(f"client {client!r}, training in round {round_}", FIT_REMEDY):
            device = self.learner.device
            received = from_message(model, device) | from_message(extras, device)
            old = method.start_client(received["weights"]) if state is None else from_message(state, device)
            self.learner.load(received)
            seed = derive_seed(self.config.seed, "federated", client, round_)
            gradients = self.learner.gradients(training, seed)
            vectors, new = train_locally(method, received, old, gradients, method.client_lr)
        if self.learner.buffers:
            vectors = vectors | {"buffers": self.learner.model()["buffers"]}
        upload = to_message(vectors)
        return Trained(len(training.labels), self.learner.mean_loss, len(upload)), upload, to_message(new)

    def validate(self, client: str, model: bytes) -> Judgement:
        """Judge the server's model on the client's validation images; scalars alone come back."""
        with failures_refused(f"client {client!r}, judging a round's model", FIT_REMEDY):
            self.learner.load(from_message(model, self.learner.device))
            return self.learner.judge(self.images(client)[1], self.prior)

    def fit_alone(self, client: str, recipe: ClassifierConfig, storage: Storage, made_of: str) -> Alone:
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
        with failures_refused(f"client {client!r}, fitting a classifier alone", FIT_REMEDY):
            fit = Fit(recipe, self.task, steps, seed, self.learner.device)
            for _ in fit.epochs(*sides):
                pass
        if fit.best is None:
            raise RuntimeError(f"client {client!r} fitted no epoch")
        file = f"{classifier_folder(lone_classifier(client))}/{WEIGHTS}"
        weights = storage.write(file, safetensors.torch.save(fit.best_weights))
        alone = Alone(fit.best.epoch, recipe.epochs, client, fingerprint=made_of, files={WEIGHTS: weights})
        keep(storage, alone)
        return alone


class Server(Keeper):
    """Aggregates. Its vectors lie in the object store between calls, which are functions of their arguments."""

    def __init__(self, config: Config, task: Task) -> None:
        self.learner = Learner(config, task, prepare_process(1, torch.device("cpu")))
        self.first = self.learner.model()

    def start(self, method: Method) -> tuple[MessageBytes, bytes, bytes, bytes]:
        """Before the first round. Returns sizes, and messages: the model, its extras, and what the server keeps."""
        return self._messages(method, self.first | method.start_server(self.first["weights"]))

    def aggregate(
        self, method: Method, n_images: int, counts: list[int], model: bytes, kept: bytes, *uploads: bytes
    ) -> tuple[MessageBytes, bytes, bytes, bytes]:
        """After a round, given the participants' image counts and uploads in order, and the count of all images."""
        updates = [Update(n, from_message(upload)) for n, upload in zip(counts, uploads, strict=True)]
        server = from_message(model) | from_message(kept)
        after = method.aggregate(server, updates, n_images)
        if "buffers" in server:
            after = after | {"buffers": weighted_mean(updates, "buffers")}
        return self._messages(method, after)

    def _messages(self, method: Method, server: dict[str, torch.Tensor]) -> tuple[MessageBytes, bytes, bytes, bytes]:
        model = to_message({k: v for k, v in server.items() if k in self.first})
        kept = to_message({k: v for k, v in server.items() if k not in self.first})
        extras = to_message(method.extras(server))
        return MessageBytes(len(model), len(extras)), model, extras, kept

    def export(self, storage: Storage, file: str, model: bytes) -> str:
        """Write a model as a classifier's weights (state dict, safetensors); returns its SHA-256."""
        self.learner.load(from_message(model))
        state = {k: v.detach().clone().contiguous() for k, v in self.learner.network.state_dict().items()}
        return storage.write(file, safetensors.torch.save(state))
