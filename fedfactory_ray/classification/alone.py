"""A fit of one worker that holds its rows: Ray Train's local mode inside one task, which needs no other process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from queue import SimpleQueue
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from fedfactory_ray.classification.card import Epoch
from fedfactory_ray.classification.loop import Loop
from fedfactory_ray.cluster.failures import find_refusal, reason
from fedfactory_ray.cluster.plan import Worker
from fedfactory_ray.storage.checkpoints import Checkpoints

log = logging.getLogger(__name__)


def fit_alone(loop: Loop, worker: Worker, checkpoints: Checkpoints, listen: Callable[[Epoch], None]) -> None:
    """Run the fit in a task; what came of it is the newest of `checkpoints`. `listen` is told of its epochs.

    A process or node that dies is followed by another, up to `resources.attempts`, from the last checkpoint. Raises
    the fit's own refusal or error, or the last RayError.
    """
    attempts, expected = loop.config.resources.attempts, 1
    for attempt in range(1, attempts + 1):
        try:
            for reference in fit_classifier.options(**worker.options).remote(loop, checkpoints):
                epoch = Epoch(**ray.get(reference))
                if epoch.epoch not in (1, expected):
                    log.info("the fit goes on from epoch %d of %d", epoch.epoch - 1, epoch.epochs)
                expected = epoch.epoch + 1
                listen(epoch)
            return
        except RayTaskError as error:
            refusal = find_refusal(error)
            if refusal is None:
                raise
            raise refusal from None
        except RayError as error:
            if attempt == attempts:
                raise
            log.warning("the fit of %s broke off (%s): it is begun anew", loop.name, reason(error))


# Not in the place of a trial of Ray Tune, which has no CPU; and begun anew by `fit_alone` alone, which counts epochs.
@ray.remote(num_returns="streaming", max_retries=0, scheduling_strategy="DEFAULT")
def fit_classifier(loop: Loop, checkpoints: Checkpoints) -> Iterator[dict[str, Any]]:
    """The fit's process: its epochs as they come, as plain values."""
    from ray.train import ScalingConfig, report
    from ray.train.torch import TorchTrainer

    from fedfactory_ray.cluster.devices import assigned_device, prepare_process

    told: SimpleQueue[Epoch | None] = SimpleQueue()
    gpus, newest = ray.get_gpu_ids(), checkpoints.newest()
    kept = {name: checkpoints.read(newest, name) for name in newest.files} if newest else {}

    def train() -> None:
        device = prepare_process(loop.threads, assigned_device(gpus))
        for epoch in loop.epochs(device, kept, lambda epoch, files: checkpoints.save(epoch.epoch, files)):
            report(asdict(epoch))
            told.put(epoch)

    trainer = TorchTrainer(train, scaling_config=ScalingConfig(num_workers=0, use_gpu=loop.gpu))
    with ThreadPoolExecutor(1) as fitting:
        fitted = fitting.submit(trainer.fit)
        fitted.add_done_callback(lambda _: told.put(None))
        while (epoch := told.get()) is not None:
            yield asdict(epoch)
        fitted.result()
