"""A trial: what Ray Tune runs in a process of its own. It starts the method's actors and passes on what they tell."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from ray import tune

from fedfactory_ray.cluster.plan import Worker, quiet
from fedfactory_ray.data.partition import Partition
from fedfactory_ray.data.source import DataInfo
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import CENTRALISED, METHOD
from fedfactory_ray.tuning.drawn import SharedImages
from fedfactory_ray.tuning.record import TrialStep, read_record

if TYPE_CHECKING:
    from fedfactory_ray.classification.card import Epoch

Tell = Callable[[int, int, float, float], None]
"""Called with a step, the most steps, and the step's validation accuracy and loss."""


@dataclass(frozen=True)
class Job:
    """One trial's work; `drawn` holds the synthetic images of a trial of the factory."""

    method: str
    config: Config
    partition: Partition
    info: DataInfo
    worker: Worker
    storage: Storage
    drawn: SharedImages | None = None


def run_trial(chosen: Mapping[str, int], jobs: Mapping[int, Job]) -> None:
    """Run the chosen job and report each of its steps to Ray Tune, or go on where an earlier start broke off.

    Reports of that start are told again, for the scheduler knows nothing of them.
    """
    job = jobs[chosen["trial"]]
    quiet()
    record = read_record(job.storage, {})
    for report in record.reports:
        tune.report(asdict(report))
    began = time.monotonic() - (record.last.seconds if record.last else 0)

    def tell(step: int, steps: int, accuracy: float, loss: float) -> None:
        best = max([accuracy, *(report.accuracy for report in record.reports)])
        report = TrialStep(step, steps, accuracy, loss, best, time.monotonic() - began)
        if record.add(report):
            tune.report(asdict(report))

    accuracy, loss = (run_classifier if job.method in (METHOD, CENTRALISED) else run_method)(job, tell)
    assert record.last is not None
    whole = replace(record.last, accuracy=accuracy, loss=loss, seconds=time.monotonic() - began, whole=True)
    tune.report(asdict(whole))


def run_method(job: Job, tell: Tell) -> tuple[float, float]:
    """A federated method; returns accuracy and loss of the chosen round on the clients' validation images."""
    from fedfactory_ray.baselines.card import Round
    from fedfactory_ray.baselines.methods import METHODS
    from fedfactory_ray.baselines.rounds import Federation

    settings, info = job.config.federated, job.info

    def on_round(done: Round) -> None:
        tell(done.round, settings.rounds, done.validation_accuracy, done.validation_loss)

    with Federation(job.config, job.partition, info.task, job.worker, job.storage) as federation:
        found = federation.run(job.method, METHODS[job.method](settings), on_round)
    for done in found.history:
        on_round(done)
    if not found.chosen:  # it diverged at once
        return 0.0, float("inf")
    chosen = found.history[found.chosen - 1]
    return chosen.validation_accuracy, chosen.validation_loss


def run_classifier(job: Job, tell: Tell) -> tuple[float, float]:
    """A classifier's fit; returns accuracy and loss of the chosen epoch on the real validation split."""
    from fedfactory_ray.baselines.centralised import real_rows, reference_config
    from fedfactory_ray.classification.training import fit

    info = job.info

    def on_epoch(epoch: Epoch) -> None:
        tell(epoch.epoch, epoch.epochs, *real(epoch))

    if job.drawn:
        config, rows = job.config, job.drawn.rows(job.config)
    else:
        config, rows = reference_config(job.config, job.partition), real_rows(job.config, job.partition, info)
    fitted = fit(config, rows, info.task, job.worker, job.storage, job.method, on_epoch, judged=True)
    for epoch in fitted.history:
        on_epoch(epoch)
    return real(fitted.history[fitted.epoch - 1])


def real(epoch: Epoch) -> tuple[float, float]:
    """Accuracy and loss of a judged epoch on the real validation split."""
    if epoch.real_accuracy is None or epoch.real_loss is None:
        raise ValueError(f"epoch {epoch.epoch} was not judged on the real validation split")
    return epoch.real_accuracy, epoch.real_loss
