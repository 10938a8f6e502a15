"""Rounds on the cluster: the driver deals clients to slots and passes references on; it holds scalars only."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import ray

from fedfactory_ray.baselines.client import FederatedClient, Server, Sizes, Trained
from fedfactory_ray.baselines.interface import Method
from fedfactory_ray.baselines.learner import Judgement, held_back
from fedfactory_ray.baselines.methods import determining
from fedfactory_ray.classification.card import verified_card
from fedfactory_ray.cluster import absence
from fedfactory_ray.cluster.plan import Worker, place, placement
from fedfactory_ray.data.partition import Partition
from fedfactory_ray.data.source import Task
from fedfactory_ray.errors import ConfigError, PartitionError
from fedfactory_ray.seeds import random_state
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.files import Storage

CHECKPOINT = ("model", "extras", "kept", "best")
LOOK_SECONDS = 1.0
"""How often it is looked whether a client's task failed, or its silo is away, while others are at work."""


@dataclass(frozen=True)
class Round:
    """One round: losses and accuracy are means over images; bytes are those of all messages."""

    round: int
    clients: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float
    bytes_up: int
    bytes_down: int
    seconds: float

    @property
    def merit(self) -> tuple[float, float]:
        """What the choice of the round goes by: validation accuracy, then loss."""
        return self.validation_accuracy, -self.validation_loss

    @property
    def diverged(self) -> bool:
        """Whether the server's weights stopped being finite."""
        return not math.isfinite(self.validation_loss)


@dataclass(frozen=True)
class Federated:
    """A finished method: its classifier in storage, the round that was chosen (0: none was better), all rounds."""

    folder: str
    sha256: str
    chosen: int
    history: list[Round]


@dataclass
class _State:
    """Where a method stands: references to messages, and scalars."""

    model: Any
    extras: Any
    kept: Any
    best: Any
    sizes: Sizes
    chosen: int = 0
    clients: dict[str, Any] = field(default_factory=dict)
    history: list[Round] = field(default_factory=list)


def check(config: Config, partition: Partition) -> None:
    """Refuse what federated methods cannot do. Raises ConfigError or PartitionError."""
    if config.classifier.precision == "fp16":
        raise ConfigError(["classifier.precision: found fp16, federated methods need auto, bf16 or fp32"])
    every = config.federated.validation_every
    largest = max(len(indices) for _, _, indices in partition)
    if largest < every:
        raise PartitionError(
            f"no client holds more than {largest} images of a class",
            f"federated.validation_every={every} of some class, one of which validates",
            "a smaller federated.validation_every",
        )


class Federation:
    """Slots with the clients of a partition dealt to them, and a server; a context that ends its actors.

    Each client stays with one slot, which keeps its images; a slot takes its clients in turn.
    """

    def __init__(self, config: Config, partition: Partition, task: Task, worker: Worker, storage: Storage) -> None:
        check(config, partition)
        every = config.federated.validation_every
        self.config, self.partition, self.task, self.storage = config, partition, task, storage
        self.images = {
            client: sum(map(len, held_back(share, every)[0].values())) for client, share in partition.shares.items()
        }
        demands = {"num_cpus": worker.num_cpus, "num_gpus": worker.num_gpus}
        self.slot: dict[str, Any] = {}
        for clients in self._deal(worker.slots):
            shares = {client: partition.shares[client] for client in clients}
            actor = cast(Any, FederatedClient).options(**demands, **placement(config, clients[0]))
            self.slot |= dict.fromkeys(clients, actor.remote(config, task, worker.resources, shares))
        self.server = cast(Any, Server).remote(config, task)

    def _deal(self, slots: int) -> list[list[str]]:
        """The clients of each slot: alike in images, or, of natural silos, those of one place."""
        if self.config.partition.silos:
            places: dict[str, list[str]] = {}
            for client in self.partition.clients:
                places.setdefault(place(self.config, client), []).append(client)
            return list(places.values())
        dealt: list[list[str]] = [[] for _ in range(min(slots, len(self.images)))]
        for client in sorted(self.images, key=lambda client: (-self.images[client], client)):
            min(dealt, key=lambda clients: sum(self.images[c] for c in clients)).append(client)
        return dealt

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in {*self.slot.values(), self.server}:
            ray.kill(actor)

    def run(self, name: str, method: Method, listen: Callable[[Round], None]) -> Federated:
        """Run `method` and keep its classifier under classifier/`name`, or go on from the last checkpoint.

        Each round: (1) the drawn clients train from the server's model; (2) the server aggregates; (3) every client
        judges the new model on its own validation images. The best round by (3) is kept. It ends after
        `federated.rounds`, after `federated.patience` rounds without a better one, or when the weights diverge.
        """
        settings, folder = self.config.federated, f"classifier/{name}"
        fingerprint = self.fingerprint(method)
        every = f"federated/{name}"  # of settings that were given up, too
        checkpoints = f"{every}/{fingerprint[:16]}"
        stored = stored_method(self.storage, folder, fingerprint)
        if stored is not None:
            self.storage.delete_folder(every)  # of a start that was killed at its very end
            return stored
        state = self._resume(checkpoints) or self._start(method)
        while not self._ended(state):
            done = self._round(method, state, len(state.history) + 1)
            listen(done)
            if done.round % settings.checkpoint_every == 0 and not self._ended(state):
                self._save(checkpoints, state)
        sha256 = ray.get(self.server.export.remote(self.storage, f"{folder}/model.safetensors", state.best))
        card = {
            "fingerprint": fingerprint,
            "method": {"name": name, **vars(method)},
            "settings": settings.model_dump(mode="json"),
            "task": asdict(self.task),
            "sha256": sha256,
            "chosen": state.chosen,
            "history": [asdict(r) for r in state.history],
        }
        self.storage.write_json(f"{folder}/card.json", card)
        self.storage.delete_folder(every)
        return Federated(folder, sha256, state.chosen, state.history)

    def fingerprint(self, method: Method) -> str:
        """SHA-256 of all that determines the method's result."""
        data = [self.config.data.source, self.partition.sha256, asdict(self.task)]
        content = [determining(self.config, method), data]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def participants(self, round_: int) -> list[str]:
        """The clients of a round, in order: the same for every method."""
        clients = self.partition.clients
        n = max(1, round(self.config.federated.client_fraction * len(clients)))
        drawn = random_state(self.config.seed, "participants", round_).permutation(len(clients))[:n]
        return [clients[i] for i in sorted(drawn)]

    def _start(self, method: Method) -> _State:
        sizes, model, extras, kept = self.server.start.options(num_returns=4).remote(method)
        return _State(model, extras, kept, model, ray.get(sizes))

    def _ended(self, state: _State) -> bool:
        rounds, settings = len(state.history), self.config.federated
        late = rounds >= settings.rounds or rounds - state.chosen >= settings.patience
        return late or (rounds > 0 and state.history[-1].diverged)

    def _round(self, method: Method, state: _State, number: int) -> Round:
        began, clients = time.monotonic(), self.participants(number)
        told, uploads = [], []
        for client in clients:
            reply = (
                self.slot[client]
                .train.options(num_returns=3)
                .remote(client, method, number, state.model, state.extras, state.clients.get(client))
            )
            told.append(reply[0])
            uploads.append(reply[1])
            state.clients[client] = reply[2]
        bytes_down = len(clients) * (state.sizes.extras + (state.sizes.model if number == 1 else 0))
        sizes, state.model, state.extras, state.kept = self.server.aggregate.options(num_returns=4).remote(
            method,
            sum(self.images.values()),
            [self.images[client] for client in clients],
            state.model,
            state.kept,
            *uploads,
        )
        judged = [self.slot[client].validate.remote(client, state.model) for client in self.partition.clients]
        asked = dict(zip([*told, *judged], [*clients, *self.partition.clients], strict=True))
        for _ in self.replies(asked):
            pass  # until everybody has replied, or somebody cannot
        trained: list[Trained] = ray.get(told)
        judgements: list[Judgement] = ray.get(judged)
        state.sizes = ray.get(sizes)
        # The model goes to every client to be judged; those of the next round have it then.
        bytes_down += len(judgements) * state.sizes.model
        validated = sum(j.images for j in judgements)
        done = Round(
            round=number,
            clients=len(clients),
            train_loss=sum(t.loss * t.images for t in trained) / sum(t.images for t in trained),
            validation_loss=sum(j.loss for j in judgements) / validated,
            validation_accuracy=sum(j.right for j in judgements) / validated,
            bytes_up=sum(t.bytes_up for t in trained),
            bytes_down=bytes_down,
            seconds=time.monotonic() - began,
        )
        best = state.history[state.chosen - 1] if state.chosen else None
        if not done.diverged and (best is None or done.merit > best.merit):
            state.chosen, state.best = number, state.model
        state.history.append(done)
        return done

    def replies(self, asked: Mapping[Any, str]) -> Iterator[Any]:
        """The values of the references `asked`, as they come; each is given by a client.

        Raises what a client's task raised, or ResourcesError when the silo of one that has not replied stays away.
        """
        waiting, away = list(asked), absence.Absence(self.config)
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=LOOK_SECONDS, fetch_local=False)
            yield from ray.get(ready)
            for refusal in away.given_up(asked[reference] for reference in waiting).values():
                raise refusal

    def _save(self, folder: str, state: _State) -> None:
        """Write a checkpoint: messages and the clients' vectors first, what names them last."""
        number = len(state.history)
        messages = [f"{folder}/round-{number:05d}/{name}.safetensors" for name in CHECKPOINT]
        saved = self.server.save.remote(self.storage, messages, state.model, state.extras, state.kept, state.best)
        written = {
            self.slot[client].save_state.remote(
                self.storage, f"{folder}/round-{number:05d}/{client}.safetensors", vectors
            ): client
            for client, vectors in state.clients.items()
        }
        for _ in self.replies(written):
            pass
        ray.get(saved)
        older = self.storage.read_json(f"{folder}/progress.json") if self._progress(folder) else None
        progress = {
            "sizes": asdict(state.sizes),
            "chosen": state.chosen,
            "clients": sorted(state.clients),
            "history": [asdict(r) for r in state.history],
        }
        self.storage.write_json(f"{folder}/progress.json", progress)
        if older is not None:
            self.storage.filesystem.delete_dir(self.storage.path(f"{folder}/round-{len(older['history']):05d}"))

    def _progress(self, folder: str) -> bool:
        return self.storage.exists(f"{folder}/progress.json")

    def _resume(self, folder: str) -> _State | None:
        if not self._progress(folder):
            return None
        progress = self.storage.read_json(f"{folder}/progress.json")
        place = f"{folder}/round-{len(progress['history']):05d}"
        model, extras, kept, best = self.server.load.options(num_returns=len(CHECKPOINT)).remote(
            self.storage, [f"{place}/{name}.safetensors" for name in CHECKPOINT]
        )
        clients = {
            client: self.slot[client].load_state.remote(self.storage, f"{place}/{client}.safetensors")
            for client in progress["clients"]
        }
        history = [Round(**line) for line in progress["history"]]
        sizes = Sizes(**progress["sizes"])
        return _State(model, extras, kept, best, sizes, progress["chosen"], clients, history)


def stored_method(storage: Storage, folder: str, fingerprint: str) -> Federated | None:
    """The finished method in `folder`, if it was made by these settings and verifies."""
    card = verified_card(storage, folder, fingerprint)
    if card is None:
        return None
    return Federated(folder, card["sha256"], card["chosen"], [Round(**line) for line in card["history"]])
