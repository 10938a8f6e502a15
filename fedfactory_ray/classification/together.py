"""A fit of several workers, or of streamed rows: Ray Train, and a queue that brings epochs to the driver."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import ray.train.torch
from ray.exceptions import RayActorError
from ray.util.queue import Queue

from fedfactory_ray.classification.card import Epoch
from fedfactory_ray.classification.loop import Loop
from fedfactory_ray.classification.rows import Rows
from fedfactory_ray.classification.sides import keep_side
from fedfactory_ray.cluster.failures import find_refusal, reason
from fedfactory_ray.cluster.plan import Worker
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import PROGRESS

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
POLL_SECONDS = "0.5"
"""How often Ray Train's controller looks after its workers; by default every 2 s, for which short fits would wait."""


def fit_together(
    loop: Loop, rows: Rows, worker: Worker, storage: Storage, folder: str, listen: Callable[[Epoch], None]
) -> Callable[[str], bytes]:
    """Run the fit with Ray Train, which keeps checkpoints in `folder` and goes on from the last one there; returns what
    reads a file of the last. `listen` is told of its epochs.

    Should Ray Train's controller die, the fit goes on with another, up to `resources.attempts`; streamed rows then wait
    up to three minutes, until Ray Data forgets what the dead one had asked for. Should the queue die, the fit goes on,
    and its epochs are told at the end. Raises the refusal of a worker, TrainingFailedError or RayActorError.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_SECONDS)
    heard: set[int] = set()

    def hear(epoch: Epoch) -> None:
        heard.add(epoch.epoch)
        listen(epoch)

    attempts = loop.config.resources.attempts
    for attempt in range(1, attempts + 1):
        try:
            checkpoint = _fit(loop, rows, worker, storage, folder, hear)
            break
        except RayActorError as error:
            if attempt == attempts:
                raise
            log.warning("the fit of %s goes on, Ray Train's controller is gone (%s)", loop.name, reason(error))

    def read(name: str) -> bytes:
        with checkpoint.filesystem.open_input_stream(f"{checkpoint.path}/{name}") as stream:
            return bytes(stream.read())

    for epoch in json.loads(read(PROGRESS))["history"]:
        if epoch["epoch"] not in heard:
            listen(Epoch(**epoch))
    return read


def _fit(
    loop: Loop, rows: Rows, worker: Worker, storage: Storage, folder: str, listen: Callable[[Epoch], None]
) -> ray.train.Checkpoint:
    """Run Ray Train once; returns the last checkpoint."""
    config, queue = loop.config, Queue(actor_options={"num_cpus": 0})
    datasets = {} if loop.table is not None else _streams(config, rows)
    trainer = ray.train.torch.TorchTrainer(
        _fit_on_worker,
        train_loop_config={"loop": loop, "queue": queue},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.resources.classifier_workers,
            use_gpu=worker.num_gpus > 0,
            resources_per_worker={"CPU": worker.num_cpus} | ({"GPU": worker.num_gpus} if worker.num_gpus else {}),
        ),
        run_config=ray.train.RunConfig(
            name=folder,
            storage_path=storage.root,
            storage_filesystem=storage.filesystem,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            failure_config=ray.train.FailureConfig(max_failures=config.resources.attempts - 1),
            callbacks=[RefusalsEnd()],
        ),
        datasets=datasets,
        dataset_config=ray.train.DataConfig(datasets_to_split=["train"]) if datasets else None,
    )
    with _relay(queue, listen), _own_interrupt():
        try:
            return trainer.fit().checkpoint
        except ray.train.TrainingFailedError as error:
            refusal = find_refusal(error)
            if refusal is None:
                raise
            raise refusal from None


@contextlib.contextmanager
def _own_interrupt() -> Iterator[None]:
    """Give Ctrl-C back after the block: Ray Train takes it, to abort its run, and keeps it."""
    here, handler = threading.current_thread() is threading.main_thread(), signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if here:
            signal.signal(signal.SIGINT, handler)


class RefusalsEnd(ray.train.UserCallback):
    """Ends a fit with the refusal of a worker, which would come again each time that Ray Train tried anew."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """See UserCallback; what it raises, Ray Train does not retry."""
        for refusal in filter(None, map(find_refusal, worker_exceptions.values())):
            raise refusal


def _streams(config: Config, rows: Rows) -> dict[str, ray.data.Dataset]:
    """The rows as data sets, those that train and those that validate."""
    dataset, fraction = rows.dataset(), config.classifier.validation_fraction
    return {
        name: dataset.map_batches(
            keep_side,
            fn_kwargs={"unit_size": rows.unit_size, "fraction": fraction, "validation": side},
            batch_format="pyarrow",
        )
        for name, side in {"train": False, "validation": True}.items()
    }


@contextlib.contextmanager
def _relay(queue: Queue, listen: Callable[[Epoch], None]) -> Iterator[None]:
    """Hand the workers' epochs to `listen` while the block runs."""
    done = threading.Event()

    def relay() -> None:
        expected = 1
        while True:
            try:
                epoch = Epoch(**queue.get(timeout=0.5))
                if epoch.epoch != expected:
                    log.info("the fit goes on from epoch %d of %d", epoch.epoch - 1, epoch.epochs)
                expected = epoch.epoch + 1
                listen(epoch)
            except Empty:
                if done.is_set():
                    return
            except RayActorError as error:
                log.warning("the fit's epochs are told at its end (%s)", reason(error))
                return

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        queue.shutdown()


def _fit_on_worker(settings: dict[str, Any]) -> None:
    """The training function of one Ray Train worker."""
    import torch

    from fedfactory_ray.cluster.devices import prepare_process

    loop: Loop = settings["loop"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    # Workers on one node see each other's GPUs, so Ray Train has to tell which one is whose.
    chosen = ray.train.torch.get_device() if loop.gpu else torch.device("cpu")
    kept: dict[str, bytes] = {}
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            kept = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}

    def keep(epoch: Epoch, files: dict[str, bytes]) -> None:
        # A report waits until the controller polls: only checkpoints are worth that.
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            ray.train.report(asdict(epoch), checkpoint=ray.train.Checkpoint.from_directory(folder) if files else None)

    def wrap(network: torch.nn.Module) -> torch.nn.Module:
        wrapped: torch.nn.Module = ray.train.torch.prepare_model(network, move_to_device=False)
        return wrapped

    device = prepare_process(loop.threads, chosen)
    for epoch in loop.epochs(device, kept, keep, rank, world, wrap=wrap):
        if rank == 0:
            with contextlib.suppress(RayActorError):  # who is gone is told nothing
                settings["queue"].put(asdict(epoch))  # plain values, or the queue's process would import torch
