"""Listeners: what a person and MLflow are told while a phase works. Each is called with the phase's events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from fedfactory_ray.federation.client import Progress, Upload
from fedfactory_ray.synthesis.shard import Shard
from fedfactory_ray.synthesis.synthesize import UnitDrawn
from fedfactory_ray.tracking.progress import Bars, bars
from fedfactory_ray.tracking.runs import ClientRun, Curves, Run

if TYPE_CHECKING:
    from fedfactory_ray.baselines.rounds import Federated, Round
    from fedfactory_ray.classification.fitting import Epoch
    from fedfactory_ray.classification.training import Classifier
    from fedfactory_ray.federation.expert import Expert
    from fedfactory_ray.federation.experts import Experts


class Listeners:
    """Makes the listener of each phase of a run; the clients' MLflow runs, which outlast their phase, are kept here."""

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

    @contextmanager
    def modules(self, steps: int) -> Iterator[ModulesListener]:
        """For a round of so many optimiser steps in all."""
        with bars(self.console, "training modules", steps, "steps") as shown:
            yield ModulesListener(self, shown)
            shown.update(steps)

    @contextmanager
    def synthesis(self, n_images: int) -> Iterator[SynthesisListener]:
        """For the drawing of so many images."""
        with bars(self.console, "drawing images", n_images, "images") as shown:
            yield SynthesisListener(self.logged, shown)

    @contextmanager
    def classifier(self, method: str, epochs: int) -> Iterator[ClassifierListener]:
        """For the fit of a method's classifier."""
        with bars(self.console, f"fitting {method}", epochs, "epochs") as shown:
            yield ClassifierListener(self.logged.result().child(f"classifier-{method}"), shown)

    @contextmanager
    def experts(self, clients: int, epochs: int) -> Iterator[ExpertsListener]:
        """For the fits of so many clients' experts."""
        with bars(self.console, "fitting experts", clients * epochs, "epochs") as shown:
            yield ExpertsListener(self, shown, epochs)

    @contextmanager
    def federated(self, method: str, run: Run, rounds: int) -> Iterator[FederatedListener]:
        """For a federated method, which has an MLflow run already."""
        with bars(self.console, method, rounds, "rounds") as shown:
            yield FederatedListener(run, shown)


class ModulesListener:
    """Hears clients train: a bar a module, a curve in each client's run."""

    def __init__(self, listeners: Listeners, shown: Bars) -> None:
        self.listeners, self.shown = listeners, shown
        self.done: dict[tuple[str, int], int] = {}

    def __call__(self, event: Progress | Upload) -> None:
        """Take a client's event."""
        if isinstance(event, Upload):
            self.listeners.client(event.card.client).upload(event)
            return
        self.listeners.client(event.client).progress(event)
        self.done[event.client, event.label] = event.step
        name = f"{event.client} class {event.label}"
        self.shown.part(name, event.step, event.steps, f"loss {event.loss:.3f}")
        self.shown.update(sum(self.done.values()))


class SynthesisListener:
    """Hears units being drawn, and counts them by node and GPU."""

    def __init__(self, logged: Future[Run], shown: Bars) -> None:
        self.logged, self.shown = logged, shown
        self.places: Counter[str] = Counter()

    def __call__(self, drawn: UnitDrawn) -> None:
        """Take a unit."""
        if drawn.node is not None:
            self.places[" ".join([drawn.node, *(f"gpu {gpu}" for gpu in drawn.gpus)])] += 1
        self.shown.update(drawn.n_images)

    def finish(self, manifest: list[Shard], seconds: float) -> None:
        """Log the manifest, and where and how fast it was drawn."""
        n_images, run = sum(shard.n for shard in manifest), self.logged.result().child("synthesis")
        run.json([vars(shard) for shard in manifest], "manifest.json")
        run.json(self.places, "units_by_node.json")
        run.metrics({"images": n_images, "seconds": seconds, "images_per_second": n_images / seconds})
        run.end()


class ClassifierListener:
    """Hears a fit's epochs."""

    def __init__(self, run: Run, shown: Bars) -> None:
        self.run, self.curves, self.shown = run, Curves(run), shown

    def __call__(self, epoch: Epoch) -> None:
        """Take an epoch."""
        self.shown.update(epoch.epoch, f"validation accuracy {epoch.validation_accuracy:.3f}")
        self.curves.add(epoch)

    def finish(self, classifier: Classifier, n_images: int) -> None:
        """Log what was fitted, and the epochs of earlier starts."""
        self.curves.rest(classifier.history)
        self.run.metrics({"images": n_images, "chosen_epoch": classifier.epoch})
        self.run.tag("sha256", classifier.sha256)
        self.run.end()


class ExpertsListener:
    """Hears clients fit their experts: a run with curves for each."""

    def __init__(self, listeners: Listeners, shown: Bars, epochs: int) -> None:
        self.console, self.logged, self.shown, self.epochs = listeners.console, listeners.logged, shown, epochs
        self.curves: dict[str, Curves] = {}
        self.done: dict[str, int] = {}

    def __call__(self, client: str, event: Epoch | Expert) -> None:
        """Take a client's epoch or, at the end, its expert."""
        from fedfactory_ray.federation.expert import Expert

        if client not in self.curves:
            self.curves[client] = Curves(self.logged.result().child(f"expert-{client}"))
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
            note = f"accuracy {event.validation_accuracy:.3f}"
            self.shown.part(f"expert of {client}", event.epoch, self.epochs, note)
        self.shown.update(sum(self.done.values()))

    def finish(self, experts: Experts) -> None:
        """Name those that are missing."""
        for client, reason in experts.missing.items():
            self.console.print(f"expert of {client} is missing, the product is without it: {reason}", markup=False)
            self.logged.result().tag(f"missing_expert.{client}", reason)
            if client in self.curves:
                self.curves[client].run.end("FAILED")


class FederatedListener:
    """Hears a federated method's rounds."""

    def __init__(self, run: Run, shown: Bars) -> None:
        self.run, self.shown = run, shown
        self.logged: set[int] = set()

    def __call__(self, done: Round) -> None:
        """Take a round."""
        self.shown.update(done.round, f"validation accuracy {done.validation_accuracy:.3f}")
        self._log(done)

    def finish(self, method: Federated) -> None:
        """Log what came of it, and the rounds of earlier starts."""
        for done in method.history:
            if done.round not in self.logged:
                self._log(done)
        self.run.flush()
        self.run.metrics({"chosen_round": method.chosen})
        self.run.tag("sha256", method.sha256)

    def _log(self, done: Round) -> None:
        self.logged.add(done.round)
        points: Mapping[str, float] = vars(done)
        self.run.grow((name, done.round, value) for name, value in points.items() if name != "round")
