"""A study: the trials of a search, with Ray Tune; the driver alone writes records, MLflow and the screen."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import yaml
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from rich.console import Console

from fedfactory_ray.baselines import rounds
from fedfactory_ray.baselines.centralised import reference_config
from fedfactory_ray.baselines.methods import METHODS, determining
from fedfactory_ray.cluster.failures import find_refusal
from fedfactory_ray.cluster.plan import Worker, make_plan
from fedfactory_ray.data.partition import Partition
from fedfactory_ray.errors import ConfigError, DataInvalidError, ResourcesError
from fedfactory_ray.pipeline.session import Session, open_session, run_name
from fedfactory_ray.pipeline.survey import check_offered, read_images, streams, survey
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import BEST_CONFIG, CENTRALISED, METHOD, TRIAL, TUNE, study_name, trial_folder
from fedfactory_ray.synthesis.plan import check_fraction, check_validation
from fedfactory_ray.tracking.progress import Bars
from fedfactory_ray.tracking.runs import Run
from fedfactory_ray.tuning.drawn import make_drawn, settings_of_images, short
from fedfactory_ray.tuning.record import Record, TrialStep, read_record
from fedfactory_ray.tuning.report import Study, TrialLine, log_study
from fedfactory_ray.tuning.search import (
    Dimension,
    Settings,
    configured,
    draw_settings,
    overrides,
    parse_search,
    value_of,
)
from fedfactory_ray.tuning.trial import Job, run_trial

FIT = ("seed", "data", "partition", "classifier")
SECTIONS = {
    **dict.fromkeys(METHODS, (*FIT, "federated")),
    CENTRALISED: FIT,
    METHOD: (*FIT, "generator", "sampler", "synthesis"),
}
"""The methods that can be tuned, and the sections of the configuration that matter to each."""
REDUCTION = 2
"""At a rung, a trial goes on if it is not below the median of those that came so far…"""
GRACE = 4
"""…and the first rung is at this part of the most steps, the next at REDUCTION times that."""


@dataclass(frozen=True)
class Trial:
    """A setting of the study, the configuration it makes, and the name of its folder."""

    method: str
    settings: Settings
    config: Config

    @property
    def name(self) -> str:
        """Unique to all that determines the trial's result."""
        if self.method not in METHODS:
            return trial_folder(short(self.config.determining()))
        method = METHODS[self.method](self.config.federated)
        return trial_folder(short(settings_of_shares(self.config) | determining(self.config, method)))


def make_trials(config: Config, method: str, search: Sequence[str], trials: int | None) -> list[Trial]:
    """The trials of a study: a function of its arguments. Raises ConfigError for what cannot be tried."""
    if method not in SECTIONS:
        raise ConfigError([f"--method: found {method!r}, needed one of {', '.join(SECTIONS)}"])
    if trials is not None and trials < 1:
        raise ConfigError([f"--trials: found {trials}, needed at least 1"])
    if config.modules is not None or (config.apart and method != METHOD):
        apart = "modules from files" if config.modules is not None else "partition natural"
        raise ConfigError([f"--method {method} with {apart}: needed all training images where it runs"])
    dimensions = parse_search(search, config, SECTIONS[method])
    found: dict[str, Trial] = {}
    problems = [
        f"--search {dimension.field}: nothing that {method} does depends on it; needed a setting that it uses"
        for dimension in dimensions
        if not _matters(dimension, method, config)
    ]
    for settings in draw_settings(dimensions, trials, config.seed):
        try:
            trial = Trial(method, settings, configured(config, settings))
            found.setdefault(trial.name, trial)
        except ConfigError as error:
            problems += [f"{overrides(settings)}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return list(found.values())


def _matters(dimension: Dimension, method: str, config: Config) -> bool:
    """Whether a value of the dimension tells a trial of `method` from those with other values."""
    field, found = dimension.field, [config]
    found += [configured(config, {field: value}) for value in dimension.choices or dimension.ends]
    values = {str(value_of(one, field)) for one in found}
    return len(values) == 1 or len({Trial(method, {}, one).name for one in found}) > 1


def run_study(
    config: Config, method: str, search: Sequence[str], trials: int | None, concurrent: int, console: Console
) -> Study:
    """Run a study, or go on where an earlier start of it stopped: finished trials are not run again, others go on from
    their last checkpoint, and modules and images are made once for all settings that agree on them.

    The metric is the accuracy on validation images: of a federated method's clients, else of the data's validation
    split; no test image is read. Trials below the median of the others at the same step are stopped early (ASHA). With
    one trial at a time the same command makes the same table. Raises FedFactoryError for what the user can mend.
    """
    made = make_trials(config, method, search, trials)
    if concurrent < 1:
        raise ConfigError([f"--concurrent: found {concurrent}, needed at least 1"])
    with open_session(
        config.model_copy(update={"name": study_name(method, run_name(config))}), console, draws=False, tests=False
    ) as session:
        worker = plan_worker(session, method, concurrent)
        storages = [session.storage.within(trial.name) for trial in made]
        records = [read_record(storage, trial.settings) for storage, trial in zip(storages, made, strict=True)]
        todo = [index for index, record in enumerate(records) if not record.finished]
        jobs = make_jobs(session, method, worker, made, storages, todo)
        unit = "rounds" if method in METHODS else "epochs"
        with Bars(console, f"tuning {method}", len(made), "trials") as shown:
            watch = Watch(session, unit, storages, records, shown)
            steps = max(_steps(method, trial.config, session.partition) for trial in made)
            run_trials(session, watch, jobs, steps, concurrent)
        lines = sorted((TrialLine.of(record) for record in records), key=lambda line: line.rank)
        study = Study(session.name, session.storage.uri, method, unit, lines)
        best = configured(config, lines[0].settings).model_dump(mode="json", exclude={"name"})
        text = yaml.safe_dump(best, sort_keys=False)
        session.storage.write(BEST_CONFIG, text.encode())
        log_study(session.run, study, text)
    return study


def plan_worker(session: Session, method: str, concurrent: int) -> Worker:
    """What each of `concurrent` trials may use. Raises ResourcesError where they would wait for one another for ever:
    a trial's own process takes no CPU, but its clients or its fit do."""
    resources, plan = session.config.resources, session.plan
    if method in METHODS:
        if plan.client.slots < concurrent:
            raise ResourcesError(
                f"room for {plan.client.slots} client actor(s)", f"one for each of {concurrent} trials at once",
                "a smaller --concurrent, or a smaller resources.client.num_cpus",
            )  # fmt: skip
        return replace(plan.client, slots=plan.client.slots // concurrent)
    workers = resources.classifier_workers * concurrent
    streamed = streams(session.config, session.info, session.partition)
    make_plan(resources.model_copy(update={"classifier_workers": workers}), streams=streamed)
    return plan.classifier


def make_jobs(
    session: Session,
    method: str,
    worker: Worker,
    trials: Sequence[Trial],
    storages: Sequence[Storage],
    todo: Sequence[int],
) -> dict[int, Job]:
    """The jobs of the trials `todo` (places among `trials`), with what they share made. Raises FedFactoryError."""
    surveys = {short(settings_of_shares(session.config)): (session.info, session.partition)}
    sessions = []
    for trial in trials:
        shares = short(settings_of_shares(trial.config))
        if shares not in surveys:
            info, partition, _ = survey(trial.config)
            surveys[shares] = info, read_images(trial.config, partition, info)
        info, partition = surveys[shares]
        check_fraction(trial.config)
        if method in METHODS:
            rounds.check(trial.config, partition)
        elif not sum(info.counts["val"]):
            raise DataInvalidError(trial.config.data.source, "no val images", "a validation split, to tune on it")
        if method == METHOD:
            check_offered(trial.config, partition, info.class_names)
            check_validation(trial.config, partition)
        agreed = trial.config.with_class_names(info.class_names)
        sessions.append(session.other(config=agreed, info=info, partition=partition))
    images = [settings_of_images(trial.config) for trial in trials]
    drawn = {}
    if method == METHOD:
        wanted = {images[index] for index in todo}
        drawn = make_drawn([inner for inner, name in zip(sessions, images, strict=True) if name in wanted])
    return {
        index: Job(method, inner.config, inner.partition, inner.info, worker, storages[index], drawn.get(images[index]))
        for index, inner in enumerate(sessions)
        if index in todo
    }


def settings_of_shares(config: Config) -> dict[str, Any]:
    """What determines who holds which images."""
    return {name: value for name, value in config.determining().items() if name in ("seed", "data", "partition")}


class Watch(tune.Callback):
    """Hears every report in the driver: trial records, MLflow and the screen are written here and nowhere else."""

    def __init__(
        self, session: Session, unit: str, storages: Sequence[Storage], records: Sequence[Record], shown: Bars
    ) -> None:
        self.session, self.unit, self.storages, self.records, self.shown = session, unit, storages, records, shown
        self.runs: dict[int, Run] = {}
        for index, record in enumerate(records):
            if record.finished:
                self.run(index).curves(point for report in record.reports for point in _points(report))
                self._close(index, "FINISHED")

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks for a restore; studies go on from their records instead.
        return {}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        """A trial reported a step."""
        index, report = trial.config["trial"], TrialStep.from_result(result)
        if self.records[index].add(report):
            self.records[index].write(self.storages[index])
        self.run(index).curves(_points(report))
        note = f"accuracy {report.accuracy:.3f}"
        name = f"trial {index + 1}"
        self.shown.part(name, report.step, report.steps, note)
        self._show(f"({name}: {self.unit} {report.step}/{report.steps}, {note})")

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A trial has come to its end, or the scheduler stopped it."""
        index = trial.config["trial"]
        record, last = self.records[index], self.records[index].last
        whole = last is not None and (last.whole or last.step >= last.steps)
        record.outcome = "whole" if whole else "stopped early"
        record.write(self.storages[index])
        if last is not None:
            self.shown.part(f"trial {index + 1}", last.steps, last.steps)
        self._close(index, "FINISHED")

    def fail(self, index: int, error: BaseException) -> None:
        """A trial has failed; the next start tries it again."""
        self.records[index].outcome = "failed"
        self.session.console.print(f"trial {index + 1} failed: {error}", markup=False, emoji=False)
        self.run(index).text(str(error), "error.txt")
        self._close(index, "FAILED")

    def run(self, index: int) -> Run:
        """A trial's MLflow run."""
        if index not in self.runs:
            self.runs[index] = self.session.run.child(f"trial-{index + 1}")
            self.runs[index].params(self.records[index].settings)
        return self.runs[index]

    def _close(self, index: int, status: str) -> None:
        run, record = self.run(index), self.records[index]
        if record.result is not None and record.last is not None:
            figures = {"accuracy": record.result.accuracy, "loss": record.result.loss, "seconds": record.last.seconds}
            run.metrics(figures | {self.unit: record.last.step})
        run.tag("outcome", str(record.outcome))
        run.end(status)
        self._show("")

    def _show(self, note: str) -> None:
        found = [record.result.accuracy for record in self.records if record.result is not None]
        best = f"best {max(found):.3f} " if found else ""
        self.shown.update(sum(record.outcome is not None for record in self.records), best + note)


def _points(report: TrialStep) -> list[tuple[str, int, float]]:
    """A report's points in MLflow's curves."""
    if report.whole:  # tells of a step that is there already
        return []
    return [("validation_accuracy", report.step, report.accuracy), ("validation_loss", report.step, report.loss)]


def run_trials(session: Session, watch: Watch, jobs: dict[int, Job], steps: int, concurrent: int) -> None:
    """Run `jobs`, of at most `steps` steps, with Ray Tune, as many at once as `concurrent`.

    Raises the first refusal, or error, if no trial of the study came to an end.
    """
    if not jobs:
        return
    # Ctrl-C shall end the job, and what trials tell is logged and shown by `watch` alone.
    os.environ |= dict.fromkeys(("TUNE_DISABLE_SIGINT_HANDLER", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"), "1")
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # or Tune prints a header in spite of verbose=0
    storage = session.storage
    scheduler = make_scheduler(steps, watch.records)
    # A trial only gives orders, so it takes no CPU from its workers; but Tune wants it to take something.
    light = tune.PlacementGroupFactory([{"memory": 1}])
    storage.delete_folder(TUNE)
    results = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, jobs=jobs), light),
        param_space={"trial": tune.grid_search(list(jobs))},
        tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=concurrent),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=storage.root,
            storage_filesystem=storage.filesystem,
            callbacks=[watch],
            failure_config=tune.FailureConfig(max_failures=session.config.resources.attempts - 1),
            verbose=0,
        ),
    ).fit()
    errors = {result.config["trial"]: result.error for result in results if result.error is not None}
    for index, error in errors.items():
        watch.fail(index, find_refusal(error) or error)
    storage.delete_folder(TUNE)
    for index, job in jobs.items():
        if watch.records[index].outcome == "stopped early":
            for name in set(job.storage.names("")) - {TRIAL}:  # checkpoints that nobody needs
                job.storage.delete(name)
    if not any(record.finished for record in watch.records):
        raise next(find_refusal(error) or error for error in errors.values())


def make_scheduler(steps: int, records: Sequence[Record]) -> TrialScheduler:
    """ASHA over at most `steps` steps, which knows of the finished `records` already."""
    if steps == 1:
        return FIFOScheduler()
    # No rung at the last step: stopping there would save nothing.
    scheduler = ASHAScheduler(
        time_attr="step",
        metric="best",
        mode="max",
        grace_period=math.ceil(steps / GRACE),
        max_t=max(math.ceil(steps / GRACE), steps - 1),
        reduction_factor=REDUCTION,
        stop_last_trials=False,
    )
    for index, record in enumerate(records):
        if record.finished:
            done = SimpleNamespace(trial_id=f"finished-{index}")
            scheduler.on_trial_add(None, done)
            for report in record.reports:
                scheduler.on_trial_result(None, done, asdict(report))
    return scheduler


def _steps(method: str, config: Config, partition: Partition) -> int:
    if method in METHODS:
        return config.federated.rounds
    return (config if method == METHOD else reference_config(config, partition)).classifier.epochs
