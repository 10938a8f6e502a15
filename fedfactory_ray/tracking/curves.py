"""Curves and clients in MLflow: what is told while work goes on, each step once."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fedfactory_ray.tracking.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ClientRun:
    """The MLflow run of one client: loss curves while it trains, its modules and its picture at the end."""

    def __init__(self, parent: Future[Run], client: str) -> None:
        self.parent, self.client = parent, client
        self.early: list[tuple[str, int, float]] = []
        self.tags: dict[str, str] = {}

    @cached_property
    def run(self) -> Run:
        """The client's own run, once the job's has started; it takes what came before."""
        run = self.parent.result().child(self.client)
        run.grow(self.early)
        self.early = []
        return run

    def progress(self, event: Any) -> None:
        """Take a point of a loss curve (a client's `Progress`)."""
        self._grow(f"loss_class_{event.label}", event.step, event.loss)

    def upload(self, event: Any) -> None:
        """Take the seconds of a module, and where it was trained (a client's `Upload`)."""
        self._grow(f"seconds_class_{event.card.label}", event.card.steps, event.seconds)
        self.tags = {"node": event.node, "gpus": ",".join(event.gpus)}

    def _grow(self, *point: Any) -> None:
        if self.parent.done():
            self.run.grow([point])
        else:
            self.early.append(point)

    def finish(self, cards: list[Any], grid: Figure | None) -> None:
        """Log the client's modules and its picture, if images were drawn of them, and end its run."""
        run = self.run
        run.metrics(
            {
                "images": sum(c.n_images for c in cards),
                "uploaded_bytes": sum(c.size for c in cards),
                "modules": len(cards),
            }
        )
        for name, value in self.tags.items():
            run.tag(name, value)
        run.json([vars(card) for card in cards], "modules.json")
        if grid is not None:
            run.figure(grid, "samples.png")
        run.end()


def expert_run(client: str) -> str:
    """Name of the run of a client's expert; that of its modules has the client's own name."""
    return f"expert-{client}"


class Curves:
    """The curves of one fit or method in its MLflow run. Each step is logged once, as it comes; those of an earlier
    start afterwards. The field `step` of a record (`epoch`, `round`) numbers it, the other fields are its figures."""

    def __init__(self, run: Run, step: str) -> None:
        self.run, self.step = run, step
        self.logged: set[int] = set()

    def add(self, done: Any) -> None:
        """Log a step's figures, unless an attempt that broke off told them already."""
        number = getattr(done, self.step)
        if number not in self.logged:
            self.logged.add(number)
            figures = {k: v for k, v in vars(done).items() if k not in (self.step, f"{self.step}s") and v is not None}
            self.run.grow((name, number, value) for name, value in figures.items())

    def rest(self, history: Iterable[Any]) -> None:
        """Log the steps of a history that are not logged yet."""
        for done in history:
            self.add(done)
