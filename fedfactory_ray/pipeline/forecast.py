"""A forecast: what a run will make, and about how long that will take, by a probe of a few steps; nothing is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import ray
from rich.console import Console

from fedfactory_ray.cluster.joining import refuse_gone
from fedfactory_ray.cluster.plan import Plan, connect
from fedfactory_ray.data.partition import Partition
from fedfactory_ray.data.source import DataInfo
from fedfactory_ray.pipeline.report import partition_table
from fedfactory_ray.pipeline.session import look_over, refusals
from fedfactory_ray.pipeline.survey import survey_here
from fedfactory_ray.settings.config import Config
from fedfactory_ray.tracking.progress import log_lines
from fedfactory_ray.tracking.table import PlainTable

PROBE_SECONDS = 2.0
"""How long each part of the work is tried, beyond its first step."""
MOST_IMAGES = 512
"""Of a class, for the probe: what a step takes does not depend on how many there are."""


@dataclass(frozen=True)
class Probe:
    """Seconds of a module's optimiser step, of drawing an image and of a step of the classifier's fit, and the bytes of
    a module's upload."""

    module_step: float
    drawn_image: float
    fit_step: float
    module_bytes: int


def forecast(config: Config, console: Console) -> PlainTable:
    """Look at the data and the cluster, probe, and tell the partition and the table. Trains nothing, keeps nothing,
    logs nothing. Raises FedFactoryError as the run would."""
    refuse_gone()
    with log_lines(console), refusals():
        found = survey_here(config)
        connect()
        (info, partition, _), plan, _ = look_over(config, found)
        console.print(partition_table(partition, info, config.generator.min_images))
        largest = max(len(indices) for _, _, indices in partition)
        probe = ray.get(probe_work.options(**plan.client.options).remote(config, info, largest, plan.client.threads))
    return forecast_table(config, info, partition, plan, probe)


def forecast_table(config: Config, info: DataInfo, partition: Partition, plan: Plan, probe: Probe) -> PlainTable:
    """The forecast of a probe."""
    generator, recipe = config.generator, config.classifier
    trains = config.modules is None
    offered = partition.offered(generator.min_images)
    shares = offered.shares.values()
    work = [sum(generator.steps(len(indices)) for indices in share.values()) for share in shares if trains]
    steps = [generator.steps(len(indices)) for _, _, indices in offered]
    drawn = config.synthesis.images_per_class * len({label for _, label, _ in offered})
    real = int(partition.matrix().sum())
    fit_steps = recipe.epochs * max(1, int(drawn * (1 - recipe.validation_fraction)) // recipe.batch_size)
    # A reference takes as many steps at least, and the recipe's epochs where there are more real images.
    reference_steps = max(fit_steps, recipe.epochs * real // recipe.batch_size) if config.references else 0
    expert_steps = fit_steps * len(partition.clients) if config.architecture != "centralised" else 0
    alone = config.architecture != "decentralised"
    seconds = {
        "modules": makespan(work, plan.client.slots) * probe.module_step,
        "synthesis": drawn * probe.drawn_image / plan.synthesis.slots,
        "classifier": fit_steps * probe.fit_step if alone else 0,
        "centralised": reference_steps * probe.fit_step,
        "experts": expert_steps * probe.fit_step / plan.client.slots,
    }
    table = PlainTable(title="what this run would make and take", title_justify="left", show_header=False)
    table.add_row("images", f"{info.resolution}×{info.resolution}, {info.channels} channel(s)")
    table.add_row("clients, side by side", f"{len(partition.clients)}, {plan.client.slots}")
    if trains:
        table.add_row("modules, of so many steps", f"{len(steps)}, {min(steps)} to {max(steps)}")
        table.add_row("bytes uploaded, in all", f"{len(steps) * probe.module_bytes / 1e6:.1f} MB")
    table.add_row("synthetic images", str(drawn), end_section=True)
    for phase, estimate in seconds.items():
        if estimate:
            table.add_row(f"about seconds, {phase}", f"{estimate:.0f}")
    table.add_row("about seconds, in all, without starts of processes", f"{sum(seconds.values()):.0f}")
    return table


def makespan(work: Sequence[int], slots: int) -> int:
    """The longest that one of so many slots works, when each takes the next client as it is free."""
    busy = [0] * max(1, slots)
    for amount in work:
        busy[busy.index(min(busy))] += amount
    return max(busy)


@ray.remote
def probe_work(config: Config, info: DataInfo, n_images: int, threads: int) -> Probe:
    """Try each part of the work on noise where a client would train; a class has `n_images`."""
    import torch

    from fedfactory_ray.classification.batches import HeldBatches
    from fedfactory_ray.classification.fitting import Fit
    from fedfactory_ray.cluster.devices import assigned_device, prepare_process, resolve_precision
    from fedfactory_ray.generation.module import pack
    from fedfactory_ray.generation.sampling import Drawing
    from fedfactory_ray.generation.training import Training
    from fedfactory_ray.synthesis.shard import image_table

    device = prepare_process(threads, assigned_device(ray.get_gpu_ids()))
    noise = np.random.RandomState(0).randint(0, 256, (min(n_images, MOST_IMAGES), *info.task.image_shape), np.uint8)
    training = Training(torch.from_numpy(noise), config.generator, device, 0)
    module_step = timed(lambda: float(training.descend()))
    module_bytes = len(pack(training.average, half=config.generator.half_precision_upload))
    precision = resolve_precision(config.generator.precision, device)
    size = config.synthesis.batch_size
    drawing = Drawing(training.average, config.sampler, size, device, precision)
    drawn_image = timed(lambda: drawing.draw(size, 0)) / size
    recipe = config.classifier.model_copy(update={"epochs": 1000})
    n = 4 * recipe.batch_size
    rows = image_table(np.resize(noise, (n, *info.task.image_shape)), np.arange(n) % info.classes, "noise")
    batches = HeldBatches(rows, info.task.image_shape, recipe.batch_size, 0, 0, 1)
    validation = HeldBatches(rows.slice(0, 1), info.task.image_shape, recipe.batch_size, 0, 0, 1)
    prepare_process(config.resources.classifier.threads, device)
    epochs = Fit(recipe, info.task, 4, 0, device).epochs(batches, validation)
    fit_step = timed(lambda: next(epochs)) / 4
    return Probe(module_step, drawn_image, fit_step, module_bytes)


def timed(work: Callable[[], object]) -> float:
    """Seconds of `work`, the first time aside: the median of as many times as PROBE_SECONDS allow."""
    work()
    began = time.monotonic()
    found: list[float] = []
    while not found or time.monotonic() - began < PROBE_SECONDS:
        start = time.monotonic()
        work()
        found.append(time.monotonic() - start)
    return float(np.median(found))
