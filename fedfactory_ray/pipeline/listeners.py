"""Listeners: what a person and MLflow are told while a phase works. Each is called with the phase's events."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from typing import TYPE_CHECKING

from rich.console import Console

from fedfactory_ray.classification.card import Classifier, Epoch, Expert
from fedfactory_ray.federation.client import Progress, Upload
from fedfactory_ray.generation.divergence import Divergence
from fedfactory_ray.storage.layout import MANIFEST
from fedfactory_ray.synthesis.shard import Shard
from fedfactory_ray.synthesis.synthesize import UnitDrawn
from fedfactory_ray.tracking.curves import ClientRun, Curves, expert_run
from fedfactory_ray.tracking.progress import Bars
from fedfactory_ray.tracking.runs import Run

if TYPE_CHECKING:
    from fedfactory_ray.baselines.card import Federated, Round
    from fedfactory_ray.federation.experts import Experts


class Listeners:
    """What the listeners of a run's phases share: where to print and log, and the clients' MLflow runs, which outlast
    their phase."""

    def __init__(self, console: Console, logged: Future[Run]) -> None:
        self.console, self.logged = console, logged
        self.clients: dict[str, ClientRun] = {}

    def client(self, name: str) -> ClientRun:
        """A client's MLflow run."""
        return self.clients.setdefault(name, ClientRun(self.logged, name))

    def end_clients(self) -> None:
        """End the clients' runs, where there is nothing more to log to them."""
        for client in self.clients.values():
            client.run.end()


class ModulesListener(Bars):
    """Hears clients take optimiser steps, so many in all: a bar a module, a curve in each client's run."""

    def __init__(self, listeners: Listeners, steps: int) -> None:
        super().__init__(listeners.console, "training modules", steps, "steps")
        self.client = listeners.client
        self.done: dict[tuple[str, int], int] = {}

    def __call__(self, event: Progress | Divergence | Upload) -> None:
        """Take a client's event."""
        if isinstance(event, Upload):
            self.client(event.card.client).upload(event)
            return
        if isinstance(event, Divergence):
            self.part(f"{event.client} class {event.label}", 1, 1)  # it leaves the screen
            return
        self.client(event.client).progress(event)
        self.done[event.client, event.label] = event.step
        self.part(f"{event.client} class {event.label}", event.step, event.steps, f"loss {event.loss:.3f}")
        self.update(sum(self.done.values()))


class SynthesisListener(Bars):
    """Hears so many images being drawn, and counts units by node and GPU."""

    def __init__(self, listeners: Listeners, n_images: int) -> None:
        super().__init__(listeners.console, "drawing images", n_images, "images")
        self.logged = listeners.logged
        self.places: Counter[str] = Counter()

    def __call__(self, drawn: UnitDrawn) -> None:
        """Take a unit."""
        if drawn.node is not None:
            self.places[" ".join([drawn.node, *(f"gpu {gpu}" for gpu in drawn.gpus)])] += 1
        self.update(drawn.n_images)

    def finish(self, manifest: list[Shard], seconds: float) -> None:
        """Log the manifest, and where and how fast it was drawn."""
        n_images, run = sum(shard.n for shard in manifest), self.logged.result().child("synthesis")
        run.json([vars(shard) for shard in manifest], MANIFEST)
        run.json(self.places, "units_by_node.json")
        run.metrics({"images": n_images, "seconds": seconds, "images_per_second": n_images / seconds})
        run.end()


class ClassifierListener(Bars):
    """Hears the epochs of a method's fit."""

    def __init__(self, listeners: Listeners, method: str, epochs: int) -> None:
        super().__init__(listeners.console, f"fitting {method}", epochs, "epochs")
        self.run = listeners.logged.result().child(f"classifier-{method}")
        self.curves = Curves(self.run, "epoch")

    def __call__(self, epoch: Epoch) -> None:
        """Take an epoch."""
        self.update(epoch.epoch, f"validation accuracy {epoch.validation_accuracy:.3f}")
        self.curves.add(epoch)

    def finish(self, classifier: Classifier, n_images: int) -> None:
        """Log what was fitted, and the epochs of earlier starts."""
        self.curves.rest(classifier.history)
        self.run.metrics({"images": n_images, "chosen_epoch": classifier.epoch})
        self.run.tag("sha256", classifier.sha256)
        self.run.end()


class ExpertsListener(Bars):
    """Hears so many clients fit their experts: a run with curves for each."""

    def __init__(self, listeners: Listeners, clients: int, epochs: int) -> None:
        super().__init__(listeners.console, "fitting experts", clients * epochs, "epochs")
        self.logged, self.epochs = listeners.logged, epochs
        self.curves: dict[str, Curves] = {}
        self.done: dict[str, int] = {}

    def __call__(self, client: str, event: Epoch | Expert) -> None:
        """Take a client's epoch or, at the end, its expert."""
        if client not in self.curves:
            self.curves[client] = Curves(self.logged.result().child(expert_run(client)), "epoch")
        curves = self.curves[client]
        if isinstance(event, Expert):
            curves.rest(event.history)
            figures = {"real": event.n_real, "pool": event.n_drawn, "downlink_bytes": event.downlink_bytes}
            curves.run.metrics(figures | {"chosen_epoch": event.epoch})
            curves.run.tag("sha256", event.sha256)
            curves.run.end()
            self.done[client] = self.epochs
        else:
            curves.add(event)
            self.done[client] = event.epoch
            self.part(f"expert of {client}", event.epoch, self.epochs, f"accuracy {event.validation_accuracy:.3f}")
        self.update(sum(self.done.values()))

    def finish(self, experts: Experts) -> None:
        """Log which are missing."""
        for client, reason in experts.missing.items():
            self.logged.result().tag(f"missing_expert.{client}", reason)
            if client in self.curves:
                self.curves[client].run.end("FAILED")


class FederatedListener(Bars):
    """Hears the rounds of a federated method, at most so many; the method has an MLflow run already."""

    def __init__(self, listeners: Listeners, method: str, run: Run, rounds: int) -> None:
        super().__init__(listeners.console, method, rounds, "rounds")
        self.run, self.curves = run, Curves(run, "round")

    def __call__(self, done: Round) -> None:
        """Take a round."""
        self.update(done.round, f"validation accuracy {done.validation_accuracy:.3f}")
        self.curves.add(done)

    def finish(self, method: Federated) -> None:
        """Log what came of it, and the rounds of earlier starts."""
        self.curves.rest(method.history)
        self.run.flush()
        self.run.metrics({"chosen_round": method.chosen})
        self.run.tag("sha256", method.sha256)
