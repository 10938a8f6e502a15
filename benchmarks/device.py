"""What one device gives: its own limits, the networks' speed beside them, and whether equal work gives equal bytes."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from fedfactory_ray.classification.batches import HeldBatches
from fedfactory_ray.classification.fitting import Fit
from fedfactory_ray.cluster.devices import prepare_process, resolve_precision
from fedfactory_ray.cluster.environment import environment
from fedfactory_ray.data.source import Task
from fedfactory_ray.generation.module import digest, pack
from fedfactory_ray.generation.sampling import Drawing
from fedfactory_ray.generation.training import Training
from fedfactory_ray.generation.unet import Denoiser
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.presets import PRESETS
from fedfactory_ray.settings.sections import ClassifierConfig, GeneratorConfig, SamplerConfig
from fedfactory_ray.synthesis.shard import image_table

CHUNKS, CHUNK_SECONDS = 3, 0.6
ON_CPU = ("digits", "fit")
"""Parts that are measured by default."""
ON_GPU = ("digits", "short", "fit", "published")
SIDE_BY_SIDE = 8
DRAWN = {"cuda": 250, "cpu": 50}
"""Images that are drawn at once, by type of device."""


@dataclass(frozen=True)
class Network:
    """A preset's generator and sampler, on images (side, side, channels)."""

    name: str
    generator: GeneratorConfig
    sampler: SamplerConfig
    side: int
    channels: int


def network(preset: str, side: int, channels: int, **sampler: Any) -> Network:
    """The generator and sampler of `preset`, the latter with changes that its name tells."""
    values = PRESETS[preset].values
    name = " ".join([preset, *(f"{setting}={value}" for setting, value in sampler.items())])
    return Network(
        name,
        GeneratorConfig.model_validate(values.get("generator", {})),
        SamplerConfig.model_validate(values.get("sampler", {}) | sampler),
        side,
        channels,
    )


@dataclass
class Bench:
    """The device, what was measured on it so far, and the seconds that are left; a row is kept at once."""

    device: torch.device
    seconds: float
    file: Path | None
    began: float = field(default_factory=time.monotonic)
    rows: list[dict[str, Any]] = field(default_factory=list)
    peak: float = 0.0
    """TFLOP/s of the device's matrix product."""

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self.began)

    def add(self, what: str, **figures: Any) -> None:
        """Keep and show a row."""
        self.rows.append({"what": what, **figures})
        print(f"[{time.monotonic() - self.began:6.1f} s] {what}: {told(figures)}", flush=True)
        if self.file is not None:
            self.file.write_text(json.dumps(self.rows, indent=1) + "\n")

    def wait(self) -> None:
        """Wait until the device has done all it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, call: Callable[[], Any], warm: int = 5) -> float:
        """Median seconds of a call, over a few chunks of many calls."""
        for _ in range(warm):
            call()
        self.wait()
        began = time.perf_counter()
        call()
        self.wait()
        n = max(1, min(300, round(CHUNK_SECONDS / (time.perf_counter() - began))))
        chunks = []
        for _ in range(CHUNKS):
            began = time.perf_counter()
            for _ in range(n):
                call()
            self.wait()
            chunks.append((time.perf_counter() - began) / n)
        return statistics.median(chunks)

    def gigabytes(self) -> float:
        """Most memory that torch had allocated on the device since the last call."""
        if self.device.type != "cuda":
            return 0.0
        peak = torch.cuda.max_memory_allocated(self.device) / 1e9
        torch.cuda.reset_peak_memory_stats(self.device)
        return round(peak, 2)


def told(figures: dict[str, Any]) -> str:
    """A row's figures as text."""
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())


def limits(bench: Bench) -> None:
    """The device's matrix product and copy, which all else is set against."""
    n, dtype = (8192, torch.bfloat16) if bench.device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=bench.device, dtype=dtype) for _ in range(2))
    bench.peak = 2 * n**3 / bench.time(lambda: a @ b) / 1e12
    source = torch.zeros(n * n * 4, device=bench.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / bench.time(lambda: target.copy_(source)) / 1e9
    bench.add("limits", dtype=str(dtype), product_tflops=bench.peak, copy_gb_per_s=copied)


def pictures(n: int, side: int, channels: int) -> Tensor:
    """Smooth random images, uint8 (n, side, side, channels)."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, channels, 5, 5, generator=draw)
    fine = F.interpolate(coarse, (side, side), mode="bicubic") + 0.05 * torch.randn(
        n, channels, side, side, generator=draw
    )
    return fine.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).contiguous()


def training_of(bench: Bench, chosen: Network, seed: int = 0) -> Training:
    """A training of that network on random pictures."""
    return Training(pictures(512, chosen.side, chosen.channels), chosen.generator, bench.device, seed)


def drawing_of(bench: Bench, chosen: Network, denoiser: Denoiser) -> Drawing:
    """What draws from a denoiser of that network."""
    precision = resolve_precision(chosen.generator.precision, bench.device)
    return Drawing(denoiser, chosen.sampler, DRAWN[bench.device.type], bench.device, precision)


def operations(chosen: Network) -> int:
    """Floating-point operations of one evaluation on one image."""
    from torch.utils.flop_counter import FlopCounterMode

    denoiser = Denoiser(chosen.generator, chosen.channels, chosen.side).eval()
    x = denoiser.mean[None]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser(x, x.new_ones(1))
    return int(counter.get_total_flops())


def training_speed(bench: Bench, chosen: Network) -> None:
    """Images a second that are trained on, and the share of the device's product that this is."""
    generator, began = chosen.generator, time.monotonic()
    bench.gigabytes()
    training = training_of(bench, chosen)
    training.descend()
    bench.wait()
    first = time.monotonic() - began
    once, batch = bench.time(training.descend), generator.batch_size
    tflops = 3 * operations(chosen) * batch / once / 1e12
    bench.add(
        f"training, {chosen.name}",
        precision=resolve_precision(generator.precision, bench.device),
        parameters_m=round(sum(weights.numel() for weights in training.current) / 1e6, 2),
        batch=batch,
        images_per_s=batch / once,
        ms_per_step=once * 1e3,
        tflops=tflops,
        of_product=round(tflops / bench.peak, 3),
        gb=bench.gigabytes(),
        seconds_to_first_step=first,
    )


def drawing_speed(bench: Bench, chosen: Network) -> None:
    """Images a second that are drawn, and the share of the device's product that this is."""
    began, size = time.monotonic(), DRAWN[bench.device.type]
    bench.gigabytes()
    drawing = drawing_of(bench, chosen, Denoiser(chosen.generator, chosen.channels, chosen.side))
    drawing.draw(size, 0)
    first = time.monotonic() - began
    once = bench.time(lambda: drawing.draw(size, 0))
    tflops = operations(chosen) * chosen.sampler.evaluations * size / once / 1e12
    bench.add(
        f"drawing, {chosen.name}",
        evaluations=chosen.sampler.evaluations,
        batch=size,
        images_per_s=size / once,
        tflops=tflops,
        of_product=round(tflops / bench.peak, 3),
        gb=bench.gigabytes(),
        seconds_to_first_batch=first,
    )


def side_by_side(bench: Bench, chosen: Network) -> None:
    """Steps a second of several modules that one client trains, in turn, against those of one."""
    trainings = [training_of(bench, chosen, seed) for seed in range(SIDE_BY_SIDE)]

    def all_of_them() -> None:
        for training in trainings:
            training.descend()

    alone = 1 / bench.time(trainings[0].descend)
    together = SIDE_BY_SIDE / bench.time(all_of_them)
    bench.add(
        f"{SIDE_BY_SIDE} modules side by side, {chosen.name}",
        steps_per_s_alone=alone,
        steps_per_s_together=together,
        ratio=together / alone,
        gb=bench.gigabytes(),
    )


def repeated(bench: Bench, chosen: Network, steps: int = 8) -> None:
    """Whether a training repeats bit for bit: again, interrupted, beside another; and a drawing."""

    def trained(interrupted: bool = False, beside: Training | None = None) -> tuple[Denoiser, str]:
        training = training_of(bench, chosen)
        while training.step < steps:
            if interrupted and training.step == steps // 2:
                saved = training.save().content
                training = training_of(bench, chosen)
                training.load(saved)
                interrupted = False
            training.descend()
            if beside is not None:
                beside.descend()
        bench.wait()
        return training.average.eval(), digest(pack(training.average, half=False))

    first, weights = trained()
    figures = {"digest": weights[:16], "again": trained()[1] == weights}
    figures["interrupted"] = trained(interrupted=True)[1] == weights
    if not chosen.generator.dropout:
        figures["beside another"] = trained(beside=training_of(bench, chosen, 1))[1] == weights
    size, drawing = DRAWN[bench.device.type], drawing_of(bench, chosen, first)
    # A first batch is launched as it is, a sixth replayed.
    images, again = drawing.draw(6 * size, seed=1), drawing.draw(size + 1, seed=1)
    figures["drawn again"] = bool((again == images[: size + 1]).all())
    bench.add(f"repeated, {chosen.name}", **figures)


def fits(bench: Bench, model: str, images: int = 8192) -> None:
    """Images a second that a classifier is fitted on (an epoch trains and validates), and whether a fit repeats."""
    recipe = ClassifierConfig.model_validate(
        {"model": model, "norm": "batch", "epochs": 3, "batch_size": 256, "flips": "horizontal", "shift": 0.125}
    )
    table = image_table(pictures(images, 32, 3).numpy(), np.arange(images) % 10, "bench")

    def fitted() -> tuple[str, float]:
        held = HeldBatches(table, (32, 32, 3), recipe.batch_size, 0, 0, 1)
        fit = Fit(recipe, Task(10, 3, 32), images // recipe.batch_size, 0, bench.device)
        spent = list(timed(fit.epochs(held, held)))
        return digest(pack(fit.network, half=False)), spent[-1]

    bench.gigabytes()
    (first, _), (second, seconds) = fitted(), fitted()
    bench.add(f"fit, {model}", images_per_s=images / seconds, again=first == second, gb=bench.gigabytes())


def timed(steps: Iterator[Any]) -> Iterator[float]:
    """Seconds of each item."""
    began = time.perf_counter()
    for _ in steps:
        now = time.perf_counter()
        yield now - began
        began = now


def device(config: Config, options: argparse.Namespace) -> Table:
    """Measure the first GPU, or the CPU where there is none; what no time is left for is named."""
    chosen = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    prepare_process(config.resources.client.threads, chosen)
    bench = Bench(chosen, options.seconds, Path(options.out) if options.out else None)
    bench.add("environment", **environment(chosen))
    digits, short = network("digits", 8, 1), network("cifar10-1gpu", 32, 3)
    published, plain = network("cifar10-published", 32, 3), network("cifar10-published", 32, 3, compile=False)
    both = (training_speed, drawing_speed)
    parts: list[tuple[str, Callable[[Bench, Any], None], Any]] = [
        *(("digits", measure, digits) for measure in (*both, repeated, side_by_side)),
        *(("short", measure, short) for measure in (*both, repeated, side_by_side)),
        *(("fit", fits, model) for model in ("cnn", "resnet18", "fast")),
        *(("published", measure, published) for measure in (*both, repeated)),
        ("published", drawing_speed, plain),
    ]
    limits(bench)
    for name, measure, what in parts:
        if name not in (options.parts or (ON_GPU if chosen.type == "cuda" else ON_CPU)):
            continue
        if bench.left < 0:
            bench.add(f"{name}: left out, time is over")
            continue
        measure(bench, what)
        if chosen.type == "cuda":
            torch.cuda.empty_cache()
    table = Table("what", "figures")
    for row in bench.rows:
        table.add_row(str(row["what"]), told({k: v for k, v in row.items() if k != "what"}))
    return table
