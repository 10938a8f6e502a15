"""Training one module: the images of one class of one client, from scratch, with Accelerate."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from fedfactory_ray.data.transforms import to_tensor
from fedfactory_ray.devices import resolve_precision, seed_process
from fedfactory_ray.generation.edm import sample_sigma
from fedfactory_ray.generation.unet import AUGMENTATIONS, Denoiser, augment
from fedfactory_ray.schedule import warmup_cosine
from fedfactory_ray.sections import GeneratorConfig

ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
REPORT_SECONDS = 1.0


@dataclass(frozen=True)
class TrainingStep:
    """Progress of one module: steps done of steps, and the mean loss since the report before."""

    step: int
    steps: int
    loss: float


def make_accelerator(device: torch.device, precision: str) -> Accelerator:
    """A single-process Accelerator on `device`; a launcher's variables would make it wait for other processes."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=ACCELERATE_PRECISION[precision])
    if accelerator.num_processes != 1 or accelerator.device.type != device.type:
        raise RuntimeError(
            f"Accelerate chose {accelerator.num_processes} processes on {accelerator.device}, needed one on {device}"
        )
    return accelerator


def ema_average(decay: float, averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
    """Move `averaged` towards `current`; the decay ramps up, so that early weights are soon forgotten."""
    count = int(count)
    torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + count) / (10 + count)))


def train_denoiser(
    images: Tensor, config: GeneratorConfig, device: torch.device, seed: int
) -> Iterator[TrainingStep | Denoiser]:
    """Train the module of one class: yields progress about once a second, and at last the averaged denoiser.

    Steps: (1) take the class's statistics; (2) for each step draw a batch with replacement, symmetries, noise levels
    and noise, and descend EDM's loss (Karras et al. 2022, eq. 8) with AdamW; (3) average the weights along the way.

    Args:
        images: uint8 (n, H, W, C), all of one class.
        config: Architecture, loss and length of training.
        device: Where to compute.
        seed: Seed of initialisation, batches and noise; the result is a function of it, of `images` and of `config`.

    Raises FloatingPointError where the loss stops being finite.
    """
    seed_process(seed)
    accelerator = make_accelerator(device, resolve_precision(config.precision, device))
    pixels = images.to(device)
    data = to_tensor(pixels, device)
    model = Denoiser(config, data.shape[1], data.shape[2]).to(device)
    model.fit_statistics(data)
    average = AveragedModel(model, multi_avg_fn=lambda a, c, n: ema_average(config.ema_decay, a, c, n))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    steps, symmetries = config.steps(len(data)), AUGMENTATIONS[config.augment]
    draw = torch.Generator(device).manual_seed(seed)
    losses: list[Tensor] = []
    reported = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * warmup_cosine(step, steps, config.warmup)
        batch = model.standardise(data[torch.randint(len(data), (config.batch_size,), generator=draw, device=device)])
        augmentation = None
        if symmetries > 1:
            augmentation = torch.randint(symmetries, (len(batch),), generator=draw, device=device)
            batch = augment(batch, augmentation)
        sigma = sample_sigma(len(batch), config.noise_mean, config.noise_std, draw)
        noise = torch.randn(batch.shape, generator=draw, device=device)
        loss = model.loss(batch, sigma, noise, augmentation)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        average.update_parameters(accelerator.unwrap_model(model))
        losses.append(loss.detach())
        if time.monotonic() - reported > REPORT_SECONDS or step + 1 == steps:
            mean = float(torch.stack(losses).mean())
            if not math.isfinite(mean):
                raise FloatingPointError(f"loss {mean} at step {step + 1} of {steps}: lower generator.learning_rate")
            yield TrainingStep(step + 1, steps, mean)
            losses, reported = [], time.monotonic()
    yield cast(Denoiser, average.module).eval()
