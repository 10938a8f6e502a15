"""A session: one job's run while it is open, with its cluster, data, partition, storage, log and clock."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from rich.console import Console

from fedfactory_ray.cluster.failures import find_refusal
from fedfactory_ray.cluster.joining import refuse_gone
from fedfactory_ray.cluster.plan import Plan, connect, make_plan
from fedfactory_ray.cluster.scaling import release
from fedfactory_ray.cluster.watchdog import Watchdog
from fedfactory_ray.data.partition import Partition
from fedfactory_ray.data.partition_files import save_partition
from fedfactory_ray.data.source import DataInfo
from fedfactory_ray.errors import FedFactoryError, ForgottenError, RunConflictError, StorageError
from fedfactory_ray.federation.exchange import import_modules, set_sha256
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.pipeline.gpus import plan_gpus
from fedfactory_ray.pipeline.survey import (
    Survey,
    check_offered,
    read_images,
    streams,
    survey,
    survey_here,
    try_files,
    warn_of_size,
)
from fedfactory_ray.settings.command_line import print_refusal
from fedfactory_ray.settings.config import MOVED, Config, flatten
from fedfactory_ray.settings.names import allowed_name
from fedfactory_ray.storage.artefact import fingerprint
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import CONFIG, FORGETTING, FORGOTTEN, SECONDS, SETTINGS
from fedfactory_ray.storage.lease import hold, refuse_held
from fedfactory_ray.synthesis.plan import check_fraction, check_validation
from fedfactory_ray.tracking import runs as tracking
from fedfactory_ray.tracking.progress import log_lines


@dataclass
class Session:
    """What every phase of a job needs. `logged` is the MLflow run, which starts in the background; `cards` are those of
    modules from files; `seconds` are this start's own, by phase."""

    config: Config
    name: str
    console: Console
    plan: Plan
    info: DataInfo
    partition: Partition
    storage: Storage
    logged: Future[tracking.Run]
    cards: list[ModuleCard] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def offered(self) -> Partition:
        """The shares that train modules."""
        return self.partition.offered(self.config.generator.min_images)

    @property
    def run(self) -> tracking.Run:
        """The job's MLflow run."""
        return self.logged.result()

    @contextmanager
    def phase(self, title: str) -> Iterator[None]:
        """Time a phase. Storage keeps the total over all attempts until it first finished; later runs that only find it
        finished do not change it."""
        began, broken = time.monotonic(), f"{title}, broken off"
        finished = False
        try:
            yield
            finished = True
        finally:
            self.seconds[title], kept = time.monotonic() - began, self.worked
            spent = self.seconds[title] + kept.pop(broken, 0)
            kept |= {title: max(spent, kept.get(title, 0))} if finished else {broken: spent}
            self.storage.write_json(SECONDS, kept)

    def other(self, **changes: Any) -> Session:
        """A session with `changes` and a clock of its own."""
        return replace(self, seconds={}, **changes)

    @property
    def worked(self) -> dict[str, float]:
        """Seconds that each phase took until it was done, not those of starts that found it done."""
        found: dict[str, float] = self.storage.read_again(SECONDS, {})
        return found


@contextmanager
def open_session(
    config: Config,
    console: Console,
    *,
    forgetting: bool = False,
    parent: str | None = None,
    draws: bool = True,
    tests: bool = True,
) -> Iterator[Session]:
    """Check what this machine sees, join the cluster, deal the partition and claim the run's folder, before any work.

    `forgetting` lets jobs/unlearn.py open what it makes; `parent` is the MLflow run to nest below; `draws` tells that
    images will be drawn, of which some have to validate; `tests` that test images will be read at the end. The MLflow
    run is marked FINISHED, FAILED or KILLED when the block ends; a refusal before the block leaves none. A worker's
    refusal is raised as itself. The session's config tells the class names that all agree on. Raises FolderHeldError
    where another start of the run is at work.
    """
    began = time.monotonic()
    name = run_name(config)
    storage = Storage(config.storage.uri).within(name)
    storage.check()
    refuse_forgotten(storage, forgetting=forgetting)
    if not config.take_over:
        refuse_held(storage)
    refuse_gone()
    with log_lines(console), ThreadPoolExecutor(1) as background, ExitStack() as ending:
        check_fraction(config)
        found = survey_here(config)
        # MLflow's import takes seconds; it gets a run when nothing is left that could be refused.
        store = background.submit(tracking.tracking_client, config)
        connect()
        logged: Future[tracking.Run] | None = None

        def last_words(refusal: FedFactoryError) -> None:
            if logged is not None and logged.done() and logged.exception() is None:
                logged.result().end("FAILED", str(refusal))
            print_refusal(refusal)

        watchdog = ending.enter_context(Watchdog(last_words))
        ending.callback(lambda: None if watchdog.gone else release())
        ending.enter_context(refusals())
        (info, partition, cards), plan, shared = look_over(config, found, draws=draws)
        if tests:
            try_files(config)
        began_to_hold = ending.enter_context(hold(storage, take_over=config.take_over))
        refuse_forgotten(storage, forgetting=forgetting)  # it may have been, while this waited
        claim(config.determining() | ({"modules": set_sha256(cards)} if cards else {}), storage)
        storage.clean(began_to_hold)
        storage.write_json(SETTINGS, config.model_dump(mode="json") | {"name": name})
        save_partition(storage, partition)
        config = config.with_class_names(info.class_names)
        if config.modules is not None:
            import_modules(config.modules, storage, cards)
        else:
            partition = read_images(config, partition, info)
        store.result()
        logged = background.submit(tracking.start_run, config, name, storage.uri, parent)
        ending.enter_context(ended(logged, watchdog))
        if shared:
            console.print(shared, markup=False, emoji=False, highlight=False)
            background.submit(lambda: logged.result().tag("gpus", shared))
        session = Session(config, name, console, plan, info, partition, storage, logged, cards)
        session.seconds["start"] = time.monotonic() - began
        yield session
        session.seconds["total"] = time.monotonic() - began


def look_over(config: Config, found: Survey | None, *, draws: bool = True) -> tuple[Survey, Plan, str]:
    """The survey, made by the cluster's nodes where none was `found` here, the plan that follows, and a line on how
    GPUs are shared, empty where none is asked for. Raises FedFactoryError for what cannot run."""
    surveyed = found or survey(config)
    info, partition, _ = surveyed
    if draws:
        check_offered(config, partition, info.class_names)
        check_validation(config, partition)
    clients, streamed = len(partition.clients), streams(config, info, partition)
    plan = make_plan(config.resources, clients=clients, streams=streamed)
    plan, shared = plan_gpus(config, plan, info, partition)
    warn_of_size(config, info, plan)
    return surveyed, plan, shared


@contextmanager
def refusals() -> Iterator[None]:
    """Raise a worker's refusal as itself."""
    try:
        yield
    except ray.exceptions.RayError as error:
        refusal = find_refusal(error)
        if refusal is None:
            raise
        raise refusal from None


@contextmanager
def ended(logged: Future[tracking.Run], watchdog: Watchdog) -> Iterator[None]:
    """End an MLflow run as the block ends: FINISHED, KILLED by Ctrl-C, or FAILED, with a refusal as its description."""
    status, why = "FAILED", ""
    try:
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        if watchdog.gone is None:
            status = "KILLED"
        why = str(watchdog.gone or "")
        raise
    except (FedFactoryError, ray.exceptions.RayError) as error:
        why = str(find_refusal(error) or "")
        raise
    finally:
        if not logged.cancel() and logged.exception() is None:
            logged.result().end(status, why)


def run_name(config: Config) -> str:
    """The configured name, or one of the characters of NAME that tells data, scheme and seed and is unique to the
    settings that matter."""
    if config.name:
        return config.name
    settings = config.determining() | ({"modules": config.typed(config.modules)} if config.modules else {})
    file = os.path.basename(os.path.abspath(config.data.source.rpartition(":")[2]))
    source = allowed_name(file.lstrip(".").partition(".")[0], otherwise="data")
    return f"{source}-{config.partition.scheme}-seed{config.seed}-{fingerprint(settings)[:8]}"


def refuse_forgotten(storage: Storage, *, forgetting: bool = False) -> None:
    """Raise ForgottenError for the folder of a run that had to forget, or of its successor that is not finished."""
    if storage.exists(FORGOTTEN):
        left = _request(storage, FORGOTTEN)
        raise ForgottenError(
            f"{storage.uri} was deleted on {left['asked_at']}, to forget {', '.join(left['exclude'])}",
            f"its successor {left['successor']}, or another --name to make a new run",
        )
    if storage.exists(FORGETTING) and not forgetting:
        asked = _request(storage, FORGETTING)
        raise ForgottenError(
            f"{storage.uri} is not finished: it is made from {asked['run']} to forget {', '.join(asked['exclude'])}",
            "the same jobs/unlearn.py again, which goes on from there",
        )


def _request(storage: Storage, name: str) -> dict[str, Any]:
    """The request that a note tells of. Raises StorageError where it is damaged."""
    found = storage.read_json(name)
    asked = found.get("request", found) if isinstance(found, dict) else found
    needed = {"run", "successor", "asked_at", "exclude"}
    if not isinstance(asked, dict) or not needed <= asked.keys() or not isinstance(asked["exclude"], list):
        raise StorageError(f"{storage.uri}/{name}", "no request", "the note as it was written")
    return asked | {"exclude": [str(entry) for entry in asked["exclude"]]}


def claim(wanted: dict[str, Any], storage: Storage, *, part: bool = False, another: str = "--name") -> None:
    """Make the folder that of the settings `wanted`; as a `part`, no matter which others once claimed it too.

    Raises RunConflictError where it is another's, telling that `another` option names another folder.
    """
    if storage.exists(CONFIG):
        there = {name: value for name, value in _claimed(storage).items() if name in wanted or not part}
        theirs = {name: value for name, value in flatten(there).items() if name not in MOVED}
        # JSON turns tuples into lists, so compare what both become.
        ours = json.loads(json.dumps(flatten(wanted)))
        differing = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))
        if differing:
            told = [f"{k}: there {theirs.get(k)!r}, here {ours.get(k)!r}" for k in differing]
            raise RunConflictError(storage.uri, told, another)
    else:
        storage.write_json(CONFIG, wanted)


def _claimed(storage: Storage) -> dict[str, Any]:
    """The settings that claim a folder. Raises StorageError where they are damaged: nobody can tell whose it is."""
    try:
        found = storage.read_json(CONFIG)
        if isinstance(found, dict):
            return found
        told = f"a {type(found).__name__}"
    except StorageError as error:
        told = error.found
    mend = "it deleted, so that the same command claims the folder anew and keeps what is its own there"
    raise StorageError(f"{storage.uri}/{CONFIG}", told, f"the file as it was written; or {mend}")
