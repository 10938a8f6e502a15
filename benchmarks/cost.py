"""What the job costs: a whole run beside bare loops of the same work, the round by clients, the driver's memory."""

from __future__ import annotations

import argparse
import io
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fedfactory_ray.settings.config import Config, merge

TINY = {"generator": {"min_steps": 2, "max_steps": 2, "min_images": 1}}


def with_sections(config: Config, **changes: Any) -> Config:
    """`config` with sections with_sections."""
    return Config.model_validate(merge(config.model_dump(), changes))


def run_quietly(config: Config) -> tuple[Any, float]:
    """A whole run in this process, in a folder that is deleted again; returns its report and peak memory in MB."""
    import resource

    from fedfactory_ray.pipeline import phases

    with tempfile.TemporaryDirectory() as folder:
        places = {"storage": {"uri": folder}, "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"}}
        report = phases.run(with_sections(config, **places), Console(file=io.StringIO()))
    return report, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def bare_modules(config: Config, shares: list[tuple[str, int, np.ndarray]]) -> float:
    """Seconds to train these modules one after the other in this process, imports and data aside."""
    import torch

    from fedfactory_ray.cluster.devices import prepare_process
    from fedfactory_ray.data.readers import open_source
    from fedfactory_ray.generation.training import train_denoiser

    device = prepare_process(config.resources.client.threads, torch.device("cpu"))
    source = open_source(config.data)
    pictures = [torch.from_numpy(source.images("train", indices)) for _, _, indices in shares]
    began = time.monotonic()
    for images in pictures:
        for _ in train_denoiser(images, config.generator, device, 0):
            pass
    return time.monotonic() - began


def bare_drawing(config: Config, shape: tuple[int, int, int], units: list[int]) -> float:
    """Seconds to draw units of these sizes in this process, imports aside."""
    import torch

    from fedfactory_ray.cluster.devices import prepare_process, resolve_precision
    from fedfactory_ray.generation.sampling import Drawing
    from fedfactory_ray.generation.unet import Denoiser

    device = prepare_process(config.resources.synthesis.threads, torch.device("cpu"))
    denoiser = Denoiser(config.generator, shape[2], shape[0]).eval()
    precision = resolve_precision(config.generator.precision, device)
    began = time.monotonic()
    drawing = Drawing(denoiser, config.sampler, config.synthesis.batch_size, device, precision)
    for n in units:
        drawing.draw(n, 0)
    return time.monotonic() - began


def bare_fit(config: Config, shape: tuple[int, int, int], classes: int, images: int) -> float:
    """Seconds to fit the classifier on noise of that many images in this process, imports aside."""
    import pyarrow as pa
    import torch

    from fedfactory_ray.classification.batches import HeldBatches
    from fedfactory_ray.classification.fitting import Fit
    from fedfactory_ray.classification.sides import keep_side
    from fedfactory_ray.cluster.devices import prepare_process
    from fedfactory_ray.data.source import Task
    from fedfactory_ray.synthesis.shard import image_column

    device = prepare_process(config.resources.classifier.threads, torch.device("cpu"))
    noise = np.random.RandomState(0).randint(0, 256, (images, *shape)).astype(np.uint8)
    places = {"label": np.arange(images) % classes, "client": pa.array(["noise"] * images)}
    table = pa.table(
        {"image": image_column(noise), **places, "unit": np.zeros(images, int), "index": np.arange(images)}
    )
    size, fraction = config.classifier.batch_size, config.classifier.validation_fraction
    training, validation = (
        HeldBatches(keep_side(table, images, fraction, validation=side), shape, size, 0, 0, 1) for side in (False, True)
    )
    fit = Fit(config.classifier, Task(classes, shape[2], shape[0]), len(training.labels) // size, 0, device)
    began = time.monotonic()
    for _ in fit.epochs(training, validation):
        pass
    return time.monotonic() - began


def bare(function: Callable[..., float], config: Config, work: Sequence[Any], workers: int, *between: Any) -> float:
    """Seconds of the slowest of `workers` processes that share `work`."""
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        shares = [pool.submit(function, config, *between, work[i::workers]) for i in range(workers)]
        return max(share.result() for share in shares)


def overhead(config: Config, options: argparse.Namespace) -> Table:
    """A run's phases beside bare loops of the same work."""
    from fedfactory_ray.classification.models import make_classifier
    from fedfactory_ray.data.partition import make_partition
    from fedfactory_ray.data.readers import open_source
    from fedfactory_ray.data.source import Task
    from fedfactory_ray.synthesis.plan import quotas

    config = with_sections(config, baselines=["none"])
    report, _ = apart(run_quietly, config)
    source = open_source(config.data)
    labels, (side, _, channels) = source.labels("train"), source.image_shape()
    shape, classes = (side, side, channels), len(source.class_names)
    partition = make_partition(config.partition, labels, classes, config.seed).offered(config.generator.min_images)
    unit, per_class = config.synthesis.unit_size, config.synthesis.images_per_class
    units = []
    for y in range(classes):
        shares = quotas({c: partition.count(c, y) for c in partition.clients}, per_class)
        units += [min(unit, n - start) for n in shares.values() for start in range(0, n, unit)]
    cores = config.resources.max_actors or multiprocessing.cpu_count()
    bare_seconds = {
        "modules": bare(bare_modules, config, list(partition), cores),
        "synthesis": bare(bare_drawing, config, units, cores, shape),
        "classifier (fedfactory)": apart(bare_fit, config, shape, classes, report.synthetic_images),
    }
    trained = sum(config.generator.steps(len(i)) for _, _, i in partition) * config.generator.batch_size
    images = {
        "modules": trained,
        "synthesis": report.synthetic_images,
        "classifier (fedfactory)": report.synthetic_images * config.classifier.epochs,
    }
    table = Table("phase", "job, s", "bare loops, s", "job / bare", "images/s in the job", "bare")
    for phase, seconds in report.seconds.items():
        if phase in bare_seconds:
            alone = bare_seconds[phase]
            rates = (f"{images[phase] / s:,.0f}" for s in (seconds, alone))
            table.add_row(phase, f"{seconds:.1f}", f"{alone:.1f}", f"{seconds / alone:.2f}", *rates)
        elif phase != "total":
            table.add_row(phase, f"{seconds:.1f}", "", "", "", "")
    total, compute = report.seconds["total"], sum(bare_seconds.values())
    table.add_row("total", f"{total:.1f}", f"{compute:.1f}", f"{total / compute:.2f}", "", "")
    network = make_classifier(config.classifier.model, Task(classes, channels, side))
    fedavg = 2 * len(partition.clients) * sum(4 * p.numel() for p in network.parameters())
    up = report.uploaded_bytes
    table.caption = (
        f"compute is {compute / total:.0%} of the job; modules: {up / 1e6:.2f} MB, once; a round of FedAvg with this "
        f"classifier: {fedavg / 1e6:.2f} MB up and down; the modules are {up / fedavg:.2f} such rounds"
    )
    return table


def round_seconds(config: Config, clients: int) -> tuple[float, float]:
    """Seconds of a round of `clients` with 20 images of one class each, and of its first event; Ray is up before."""
    from fedfactory_ray.cluster.plan import connect, make_plan
    from fedfactory_ray.data.partition import make_partition
    from fedfactory_ray.data.readers import open_source
    from fedfactory_ray.federation.round import run_round
    from fedfactory_ray.storage.files import Storage

    source = open_source(config.data)
    classes = len(source.class_names)
    counts = [[10 if y == client % classes else 0 for y in range(classes)] for client in range(clients)]
    config = with_sections(config, partition={"scheme": "skew", "counts": counts})
    partition = make_partition(config.partition, source.labels("train"), classes, config.seed)
    connect()
    with tempfile.TemporaryDirectory() as folder:
        began, first = time.monotonic(), []
        run_round(
            config,
            partition,
            make_plan(config.resources).client,
            Storage(folder),
            lambda event: first.append(time.monotonic()),
        )
        return time.monotonic() - began, first[0] - began


def clients(config: Config, options: argparse.Namespace) -> Table:
    """How the round grows with clients and shrinks with actors."""
    table = Table("clients", "actors", "round, s", "per client, s", "of it until the first report, s")
    settings = [(5, 2, {}), (10, 2, {}), (20, 2, {}), (10, 1, {}), (100, 2, TINY)]
    for n, actors, changes in settings:
        seconds, first = apart(round_seconds, with_sections(config, resources={"max_actors": actors}, **changes), n)
        name = f"{n} tiny" if changes else str(n)
        table.add_row(name, str(actors), f"{seconds:.1f}", f"{seconds / n:.2f}", f"{first:.1f}")
    return table


def memory(config: Config, options: argparse.Namespace) -> Table:
    """The driver's peak memory against images and clients."""
    small = with_sections(config, baselines=["none"], classifier={"epochs": 1}, **TINY)
    table = Table("clients", "synthetic images", "driver's peak, MB")
    for n, images in [(10, 200), (10, 2000), (100, 200)]:
        settings = with_sections(small, partition={"clients": n, "min_size": 1}, synthesis={"images_per_class": images})
        report, peak = apart(run_quietly, settings)
        table.add_row(str(n), f"{report.synthetic_images:,}", f"{peak:.0f}")
    return table
