"""Training one module: the images of one class of one client, from scratch, with Accelerate."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import safetensors.torch
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from fedfactory_ray.cluster.devices import resolve_precision, seed_process
from fedfactory_ray.data.transforms import augment, to_tensor
from fedfactory_ray.generation.edm import sample_sigma
from fedfactory_ray.generation.unet import AUGMENTATIONS, Denoiser
from fedfactory_ray.schedule import warmup_cosine
from fedfactory_ray.settings.sections import GeneratorConfig

ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
REPORT_SECONDS = 1.0


@dataclass(frozen=True)
class TrainingStep:
    """Progress of one module: steps done of steps, and the mean loss since the report before."""

    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class Snapshot:
    """Everything that the step after `step` depends on, as safetensors."""

    step: int
    content: bytes


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


class Training:
    """A module's training while it lasts: network, average, optimiser and random numbers, and the checkpoint of all.

    The result is a function of `images`, `config` and `seed`, however often the training is interrupted.
    """

    def __init__(self, images: Tensor, config: GeneratorConfig, device: torch.device, seed: int) -> None:
        """Take the class's statistics from `images`, uint8 (n, H, W, C), all of one class."""
        seed_process(seed)
        self.config, self.device = config, device
        self.accelerator = make_accelerator(device, resolve_precision(config.precision, device))
        self.data = to_tensor(images.to(device), device)
        network = Denoiser(config, self.data.shape[1], self.data.shape[2]).to(device)
        network.fit_statistics(self.data)
        decay = config.ema_decay
        self.average = AveragedModel(network, multi_avg_fn=lambda a, c, n: ema_average(decay, a, c, n))  # type: ignore[arg-type]
        self.model, self.optimizer = self.accelerator.prepare(
            network,
            torch.optim.AdamW(
                network.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay
            ),
        )
        self.model.train()
        self.steps, self.step = config.steps(len(self.data)), 0
        self.draw = torch.Generator(device).manual_seed(seed)

    def descend(self) -> Tensor:
        """One optimiser step on EDM's loss (Karras et al. 2022, eq. 8); returns the loss, ()."""
        config, device = self.config, self.device
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * warmup_cosine(self.step, self.steps, config.warmup)
        chosen = torch.randint(len(self.data), (config.batch_size,), generator=self.draw, device=device)
        batch = self.model.standardise(self.data[chosen])
        symmetries, augmentation = AUGMENTATIONS[config.augment], None
        if symmetries > 1:
            augmentation = torch.randint(symmetries, (len(batch),), generator=self.draw, device=device)
            batch = augment(batch, augmentation)
        sigma = sample_sigma(len(batch), config.noise_mean, config.noise_std, self.draw)
        noise = torch.randn(batch.shape, generator=self.draw, device=device)
        loss = self.model.loss(batch, sigma, noise, augmentation)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimizer.step()
        self.average.update_parameters(self.accelerator.unwrap_model(self.model))
        self.step += 1
        return cast(Tensor, loss.detach())

    def save(self) -> Snapshot:
        """Where the training stands."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
        tensors |= {"draw": self.draw.get_state(), "random.cpu": torch.get_rng_state(), "step": torch.tensor(self.step)}
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        if self.accelerator.scaler is not None:
            scaler = self.accelerator.scaler.state_dict()
            tensors["scaler"] = torch.tensor([scaler["scale"], scaler["_growth_tracker"]], dtype=torch.float64)
        content = safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
        return Snapshot(self.step, content)

    def load(self, checkpoint: bytes) -> None:
        """Go on from the content of a snapshot of the same training."""
        tensors = safetensors.torch.load(checkpoint)

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        self.average.load_state_dict(part("average."))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in part("optimizer.").items():
            i, _, key = name.partition(".")
            moments.setdefault(int(i), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.draw.set_state(tensors["draw"])
        torch.set_rng_state(tensors["random.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        if self.accelerator.scaler is not None:
            scale, growth = tensors["scaler"].tolist()
            state = self.accelerator.scaler.state_dict()
            self.accelerator.scaler.load_state_dict(state | {"scale": scale, "_growth_tracker": int(growth)})
        self.step = int(tensors["step"])


def train_denoiser(
    images: Tensor,
    config: GeneratorConfig,
    device: torch.device,
    seed: int,
    checkpoint: bytes | None = None,
    checkpoint_seconds: float = math.inf,
) -> Iterator[TrainingStep | Snapshot | Denoiser]:
    """Train the module of one class.

    Yields progress about once a second, every `checkpoint_seconds` a snapshot from which a later call goes on to the
    same result, and at last the averaged denoiser.

    Args:
        images: uint8 (n, H, W, C), all of one class.
        config: Architecture, loss and length of training.
        device: Where to compute.
        seed: Seed of initialisation, batches and noise.
        checkpoint: Content of a snapshot of an earlier call with the same arguments, on a device of the same type.
        checkpoint_seconds: Time between snapshots.

    Raises FloatingPointError where the loss stops being finite.
    """
    training = Training(images, config, device, seed)
    if checkpoint is not None:
        training.load(checkpoint)
    losses: list[Tensor] = []
    reported = saved = time.monotonic()
    while training.step < training.steps:
        losses.append(training.descend())
        now, ended = time.monotonic(), training.step == training.steps
        if now - reported > REPORT_SECONDS or ended:
            mean = float(torch.stack(losses).mean())
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"loss {mean} at step {training.step} of {training.steps}: lower generator.learning_rate"
                )
            yield TrainingStep(training.step, training.steps, mean)
            losses, reported = [], now
        if now - saved > checkpoint_seconds and not ended:
            yield training.save()
            saved = now
    yield cast(Denoiser, training.average.module).eval()
