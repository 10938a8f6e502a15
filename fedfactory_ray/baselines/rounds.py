"""Rounds on the cluster: the driver deals clients to slots and passes references on; it holds scalars only."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import ray

from fedfactory_ray.baselines.card import Federated, Round
from fedfactory_ray.baselines.client import FederatedClient, MessageBytes, Server, Trained
from fedfactory_ray.baselines.interface import Method
from fedfactory_ray.baselines.learner import Judgement, balanced_accuracy, held_back
from fedfactory_ray.baselines.methods import determining
from fedfactory_ray.classification.rules import prior_of
from fedfactory_ray.cluster.absence import gather
from fedfactory_ray.cluster.plan import Worker, place, placement, start_actor
from fedfactory_ray.cluster.stored import find_all
from fedfactory_ray.data.partition import Partition
from fedfactory_ray.data.source import Task
from fedfactory_ray.errors import ConfigError, PartitionError
from fedfactory_ray.seeds import random_state
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.artefact import fingerprint, keep
from fedfactory_ray.storage.checkpoints import Checkpoints
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import WEIGHTS, classifier_folder, message_file, method_folder, state_file

MESSAGES = ("model", "extras", "kept", "best")
"""The server's, in a checkpoint."""
log = logging.getLogger(__name__)


@dataclass
class _State:
    """Where a method stands: references to messages, and scalars."""

    model: Any
    extras: Any
    kept: Any
    best: Any
    sizes: MessageBytes
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

    def __init__(
        self,
        config: Config,
        partition: Partition,
        task: Task,
        worker: Worker,
        storage: Storage,
        start: Callable[..., Any] = start_actor,
    ) -> None:
        """`start` makes actors of their classes: on Ray or, to look at a method closely, in this process."""
        check(config, partition)
        every = config.federated.validation_every
        self.config, self.partition, self.task, self.storage = config, partition, task, storage
        self.n_images = {
            client: sum(map(len, held_back(share, every)[0].values())) for client, share in partition.shares.items()
        }
        restarts = config.resources.attempts - 1
        repeatable = {"max_restarts": restarts, "max_task_retries": restarts}
        # The default strategy, else they wait for room in the placement group of a tuner's trial.
        demands = worker.options | repeatable | {"scheduling_strategy": "DEFAULT"}
        self.slot: dict[str, Any] = {}
        prior = prior_of(partition.matrix().sum(0))
        for clients in self._deal(worker.slots):
            shares = {client: partition.shares[client] for client in clients}
            options = demands | placement(config, clients[0])
            self.slot |= dict.fromkeys(
                clients, start(FederatedClient, config, task, worker.threads, shares, prior, **options)
            )
        self.server = start(Server, config, task, num_cpus=0, **repeatable)

    def _deal(self, slots: int) -> list[list[str]]:
        """The clients of each slot: alike in images, or, of natural silos, those of one place."""
        if self.config.partition.silos:
            places: dict[str, list[str]] = {}
            for client in self.partition.clients:
                places.setdefault(place(self.config, client), []).append(client)
            return list(places.values())
        dealt: list[list[str]] = [[] for _ in range(min(slots, len(self.n_images)))]
        for client in sorted(self.n_images, key=lambda client: (-self.n_images[client], client)):
            min(dealt, key=lambda clients: sum(self.n_images[c] for c in clients)).append(client)
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
        made_of, place = self.fingerprint(method), classifier_folder(name)
        checkpoints = Checkpoints(self.storage, method_folder(name), made_of)
        stored = find_all(self.storage, Federated, {place: made_of}).get(place)
        if stored is not None:
            checkpoints.delete()  # of a start that was killed at its very end
            return stored
        state = self._resume(checkpoints) or self._start(method)
        while not self._ended(state):
            done = self._round(method, state, len(state.history) + 1)
            listen(done)
            if done.round % self.config.storage.checkpoint_rounds == 0 and not self._ended(state):
                self._save(checkpoints, state)
        federated = Federated(
            method={"name": name, **vars(method)},
            settings=self.config.federated.model_dump(mode="json"),
            task=self.task,
            chosen=state.chosen,
            history=state.history,
            name=name,
            fingerprint=made_of,
            files={WEIGHTS: ray.get(self.server.export.remote(self.storage, f"{place}/{WEIGHTS}", state.best))},
        )
        keep(self.storage, federated)
        checkpoints.delete()
        return federated

    def fingerprint(self, method: Method) -> str:
        """What determines the method's result."""
        return fingerprint(Federated.kind, determining(self.config, method), self.partition.content, asdict(self.task))

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
            sum(self.n_images.values()),
            [self.n_images[client] for client in clients],
            state.model,
            state.kept,
            *uploads,
        )
        judged = [self.slot[client].validate.remote(client, state.model) for client in self.partition.clients]
        asked = dict(zip([*told, *judged], [*clients, *self.partition.clients], strict=True))
        gather(asked, self.config)  # until everybody has replied, or somebody cannot
        trained: list[Trained] = ray.get(told)
        judgements: list[Judgement] = ray.get(judged)
        state.sizes = ray.get(sizes)
        # The model goes to every client to be judged; those of the next round have it then.
        bytes_down += len(judgements) * state.sizes.model
        validated = sum(j.n_images for j in judgements)
        done = Round(
            round=number,
            clients=len(clients),
            train_loss=sum(t.loss * t.n_images for t in trained) / sum(t.n_images for t in trained),
            validation_loss=sum(j.loss for j in judgements) / validated,
            validation_accuracy=sum(j.right for j in judgements) / validated,
            validation_balanced=balanced_accuracy(judgements),
            bytes_up=sum(t.bytes_up for t in trained),
            bytes_down=bytes_down,
            seconds=time.monotonic() - began,
        )
        best = state.history[state.chosen - 1] if state.chosen else None
        if not done.diverged and (best is None or done.merit > best.merit):
            state.chosen, state.best = number, state.model
        state.history.append(done)
        return done

    def _save(self, checkpoints: Checkpoints, state: _State) -> None:
        """Write a checkpoint: messages and the clients' vectors where they are, what names them here."""
        number, messages = len(state.history), (state.model, state.extras, state.kept, state.best)
        kept = [(message_file(name), "", self.server, m) for name, m in zip(MESSAGES, messages, strict=True)]
        kept += [(state_file(client), client, self.slot[client], vectors) for client, vectors in state.clients.items()]
        asked = {
            actor.save.remote(self.storage, checkpoints.file(number, file), message): (file, client)
            for file, client, actor, message in kept
        }
        written = gather({reply: client for reply, (_, client) in asked.items()}, self.config)
        digests = {file: digest for (file, _), digest in zip(asked.values(), written, strict=True)}
        checkpoints.seal(
            number,
            digests,
            {
                "sizes": asdict(state.sizes),
                "chosen": state.chosen,
                "clients": sorted(state.clients),
                "history": [asdict(r) for r in state.history],
            },
        )

    def _resume(self, checkpoints: Checkpoints) -> _State | None:
        newest = ray.get(self.server.newest.remote(checkpoints))
        if newest is None:
            return None
        log.info("the rounds go on from round %d of %d", newest.step, self.config.federated.rounds)

        def load(actor: Any, file: str) -> Any:
            return actor.load.remote(self.storage, checkpoints.file(newest.step, file))

        model, extras, kept, best = (load(self.server, message_file(name)) for name in MESSAGES)
        clients = {client: load(self.slot[client], state_file(client)) for client in newest.state["clients"]}
        history = [Round(**line) for line in newest.state["history"]]
        sizes = MessageBytes(**newest.state["sizes"])
        return _State(model, extras, kept, best, sizes, newest.state["chosen"], clients, history)
