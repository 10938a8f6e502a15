"""Training one module: the images of one class of one client, from scratch, with Accelerate."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from torch import Tensor

from fedfactory_ray.cluster.capture import Capture
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


@torch.no_grad()
def update_average(averaged: Sequence[Tensor], current: Sequence[Tensor], decay: float, step: int) -> None:
    """Move `averaged` towards `current`, the weights after `step`; the decay ramps up, so that early weights are soon
    forgotten."""
    if step == 0:
        torch._foreach_copy_(list(averaged), list(current))
    else:
        torch._foreach_lerp_(list(averaged), list(current), 1 - min(decay, (1 + step) / (10 + step)))


class Training:
    """A module's training while it lasts: network, average, optimiser and random numbers, and the checkpoint of all.

    The result is a function of `images`, `config` and `seed`, however often the training is interrupted, and whatever
    else trains in the process; only dropout draws from torch's global generator, so such trainings need it alone.
    """

    def __init__(self, images: Tensor, config: GeneratorConfig, device: torch.device, seed: int) -> None:
        """Take the class's statistics from `images`, uint8 (n, H, W, C), all of one class."""
        seed_process(seed)
        self.config, self.device = config, device
        self.accelerator = make_accelerator(device, resolve_precision(config.precision, device))
        self.data = to_tensor(images.to(device), device)
        self.network = Denoiser(config, self.data.shape[1], self.data.shape[2]).to(device)
        self.network.fit_statistics(self.data)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.averaged, self.current = ([*network.parameters()] for network in (self.average, self.network))
        on_gpu = device.type == "cuda"
        adamw = torch.optim.AdamW(
            self.current,
            # A captured step reads the rate where it lies on the device.
            lr=torch.tensor(config.learning_rate, device=device) if on_gpu else config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=on_gpu or None,
            capturable=on_gpu,
        )
        # Of Accelerate's preparation the network needs the arithmetic alone, which `autocast` gives without a cycle of
        # references: what has finished leaves memory at once.
        self.optimizer = self.accelerator.prepare(adamw, device_placement=[False])
        self.network.train()
        self.steps, self.step = config.steps(len(self.data)), 0
        self.draw = torch.Generator(device).manual_seed(seed)
        # The scaler of fp16 waits for the device in each step.
        scaled = self.accelerator.scaler is not None
        self.capture: Callable[[], Tensor] = self._descend if scaled else Capture(self._descend, device, [self.draw])
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def on_stream(self) -> AbstractContextManager[Any]:
        """The stream of this training, where the device computes it beside others."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def descend(self) -> Tensor:
        """One optimiser step on EDM's loss (Karras et al. 2022, eq. 8); returns the loss, ()."""
        rate = self.config.learning_rate * warmup_cosine(self.step, self.steps, self.config.warmup)
        with self.on_stream():
            for group in self.optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            loss = self.capture()
            update_average(self.averaged, self.current, self.config.ema_decay, self.step)
        self.step += 1
        return loss

    def _descend(self) -> Tensor:
        """What a device does in a step, but for the average: it waits for nothing."""
        config, device = self.config, self.device
        chosen = torch.randint(len(self.data), (config.batch_size,), generator=self.draw, device=device)
        batch = self.network.standardise(self.data[chosen])
        symmetries, augmentation = AUGMENTATIONS[config.augment], None
        if symmetries > 1:
            augmentation = torch.randint(symmetries, (len(batch),), generator=self.draw, device=device)
            batch = augment(batch, augmentation)
        sigma = sample_sigma(len(batch), config.noise_mean, config.noise_std, self.draw)
        noise = torch.randn(batch.shape, generator=self.draw, device=device)
        self.optimizer.zero_grad()
        losses = []
        for rows in torch.arange(config.batch_size).split(config.images_at_once or config.batch_size):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            told = None if augmentation is None else augmentation[part]
            with self.accelerator.autocast():
                loss = self.network.loss(batch[part], sigma[part], noise[part], told)
            loss = loss * (len(rows) / config.batch_size)
            self.accelerator.backward(loss)
            losses.append(loss.detach())
        self.accelerator.clip_grad_norm_(self.current, config.grad_clip)
        self.optimizer.step()
        return torch.stack(losses).sum()

    def save(self) -> Snapshot:
        """Where the training stands."""
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
        tensors |= {"draw": self.draw.get_state(), "random.cpu": torch.get_rng_state(), "step": torch.tensor(self.step)}
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        if self.accelerator.scaler is not None:
            scaler = self.accelerator.scaler.state_dict()
            tensors["scaler"] = torch.tensor([scaler["scale"], scaler["_growth_tracker"]], dtype=torch.float64)
        with self.on_stream():
            content = safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
        return Snapshot(self.step, content)

    def load(self, checkpoint: bytes) -> None:
        """Go on from the content of a snapshot of the same training."""
        tensors = safetensors.torch.load(checkpoint)

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in part("optimizer.").items():
            i, _, key = name.partition(".")
            moments.setdefault(int(i), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        with self.on_stream():
            self.network.load_state_dict(part("network."))
            self.average.load_state_dict(part("average."))
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

    def events(self, checkpoint_seconds: float = math.inf) -> Iterator[TrainingStep | Snapshot | Denoiser | None]:
        """Train to the end: about once a second progress, every `checkpoint_seconds` a snapshot, at last the averaged
        denoiser; and None after each other step, so that trainings can take turns.

        Raises FloatingPointError where the loss stops being finite.
        """
        losses: list[Tensor] = []
        reported = saved = time.monotonic()
        while self.step < self.steps:
            losses.append(self.descend())
            now, ended = time.monotonic(), self.step == self.steps
            saves = now - saved > checkpoint_seconds and not ended
            if now - reported > REPORT_SECONDS or ended or saves:  # no snapshot is of a loss that nobody looked at
                with self.on_stream():
                    mean = float(torch.stack(losses).mean())
                if not math.isfinite(mean):
                    raise FloatingPointError(
                        f"loss {mean} at step {self.step} of {self.steps}: lower generator.learning_rate"
                    )
                yield TrainingStep(self.step, self.steps, mean)
                losses, reported = [], now
            if saves:
                yield self.save()
                saved = now
            yield None
        if self.stream is not None:
            self.stream.synchronize()
        del self.capture  # it refers to this training, which is to leave memory at once
        yield self.average.eval()


def train_denoiser(
    images: Tensor,
    config: GeneratorConfig,
    device: torch.device,
    seed: int,
    checkpoint: bytes | None = None,
    checkpoint_seconds: float = math.inf,
) -> Iterator[TrainingStep | Snapshot | Denoiser]:
    """Train the module of one class: the events of its Training, the denoiser last.

    Args:
        images: uint8 (n, H, W, C), all of one class.
        config: Architecture, loss and length of training.
        device: Where to compute.
        seed: Seed of initialisation, batches and noise.
        checkpoint: Content of a snapshot of an earlier call with the same arguments, on a device of the same type.
        checkpoint_seconds: Time between snapshots.
    """
    training = Training(images, config, device, seed)
    if checkpoint is not None:
        training.load(checkpoint)
    yield from (event for event in training.events(checkpoint_seconds) if event is not None)
