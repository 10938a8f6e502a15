"""Fitting a classifier in one process: the recipe's loop, epoch by epoch, and the checkpoint that continues it."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

import safetensors.torch
import torch
from torch import Tensor, nn

from fedfactory_ray.classification.batches import Batches, Held
from fedfactory_ray.classification.card import Epoch
from fedfactory_ray.classification.fast import FastNetwork
from fedfactory_ray.classification.models import make_classifier
from fedfactory_ray.classification.step import Step, make_optimizer
from fedfactory_ray.cluster.capture import Capture
from fedfactory_ray.cluster.devices import autocast, resolve_precision, seed_process
from fedfactory_ray.data.source import Task
from fedfactory_ray.data.transforms import to_tensor
from fedfactory_ray.schedule import warmup_cosine
from fedfactory_ray.seeds import derive_seed
from fedfactory_ray.settings.sections import ClassifierConfig
from fedfactory_ray.storage.layout import PROGRESS, STATE, WEIGHTS

WARMUP = 0.05
WHITENED = 512
"""Images whose patches whiten a network's first layer."""


def _itself(network: nn.Module) -> nn.Module:
    return network


def _first_images(batches: Batches, n: int) -> Tensor:
    """`n` images of the first epoch, uint8 (n, H, W, C) on the CPU, or all if there are fewer."""
    found: list[Tensor] = []
    for images, _ in batches.epoch(0):
        found.append(images.cpu())
        if sum(map(len, found)) >= n:
            break
    return torch.cat(found)[:n]


def _kept(tensor: Tensor) -> Tensor:
    """A copy on the CPU, in the layout that safetensors asks for."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


class Fit:
    """One fit: network, optimiser, history and the best weights so far, by validation loss.

    With several workers, each holds a Fit of its own `rank`; `wrap` averages their gradients.
    """

    def __init__(
        self,
        recipe: ClassifierConfig,
        task: Task,
        steps_per_epoch: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        wrap: Callable[[nn.Module], nn.Module] = _itself,
    ) -> None:
        self.recipe, self.seed, self.device, self.rank, self.world = recipe, seed, device, rank, world
        self.precision = resolve_precision(recipe.precision, device)
        self.steps = recipe.epochs * steps_per_epoch
        seed_process(seed)
        self.network = make_classifier(recipe.model, task, recipe.norm, recipe.flips).to(device)
        if device.type == "cuda":
            self.network.to(memory_format=torch.channels_last)  # what its convolutions compute in
        self.optimizer = make_optimizer(recipe, self.network, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.wrap = wrap
        self.draw = torch.Generator(device)
        self.step = 0
        self.history: list[Epoch] = []
        self.best: Epoch | None = None
        self.best_weights: dict[str, Tensor] = {}

    def epochs(self, training: Batches, validation: Batches, real: Batches | None = None) -> Iterator[Epoch]:
        """Fit epoch by epoch, going on behind the loaded checkpoint if there is one.

        `validation` chooses the epoch; what is told of `real` changes nothing. Raises FloatingPointError where no
        epoch has a finite validation loss.
        """
        for side in (training, validation, real):
            if side is not None:
                side.to(self.device)
        if isinstance(self.network, FastNetwork) and not self.history:
            self.network.whitening.fit(to_tensor(_first_images(training, WHITENED)))
        model = self.wrap(self.network)
        step = Step(self.recipe, model, self.optimizer, self.scaler, self.precision, self.draw)
        # Several workers, a scale that is read and streams that run beside go by no graph.
        alone = self.world == 1 and self.precision != "fp16" and isinstance(training, Held)
        take = Capture(step, self.device, [self.draw]) if alone else step
        for epoch in range(len(self.history), self.recipe.epochs):
            model.train()
            loss = self._train(step, take, training, epoch)
            validation_loss, accuracy = self._validate(validation)
            judged = self._validate(real) if real is not None else (None, None)
            done = Epoch(epoch + 1, self.recipe.epochs, loss, validation_loss, accuracy, *judged)
            self.history.append(done)
            better = self.best is None or done.validation_loss <= self.best.validation_loss
            if better and math.isfinite(done.validation_loss):
                self.best = done
                self.best_weights = {k: _kept(v) for k, v in self.network.state_dict().items()}
            yield done
        if self.best is None:
            raise FloatingPointError(
                f"the classifier's validation loss was never finite in {self.recipe.epochs} epochs: the fit diverged; "
                "try a smaller classifier.learning_rate"
            )

    def _train(self, step: Step, take: Callable[[], Tensor], training: Batches, epoch: int) -> float:
        # Generators of this epoch and rank: a resumed fit draws what an unbroken one draws.
        torch.manual_seed(derive_seed(self.seed, epoch, self.rank))
        self.draw.manual_seed(derive_seed(self.seed, epoch, self.rank, "augment"))
        losses = []
        for images, labels in training.epoch(epoch):
            step.put(images, labels, warmup_cosine(self.step, self.steps, WARMUP))
            losses.append(take())
            self.step += 1
        return float(torch.stack(losses).mean())

    @torch.inference_mode()
    def _validate(self, batches: Batches) -> tuple[float, float]:
        """Mean loss and accuracy of the validation rows, over all workers."""
        self.network.eval()
        sums, count = torch.zeros(2, dtype=torch.float64, device=self.device), 0
        for images, labels in batches.epoch(None):
            labels = labels.to(self.device, non_blocking=True)
            with autocast(self.device, self.precision):
                logits = self.network(to_tensor(images, self.device)).float()
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([loss.double(), (logits.argmax(1) == labels).sum().double()])
            count += len(labels)
        sums = torch.cat([sums, torch.tensor([count], dtype=torch.float64, device=self.device)])
        if self.world > 1:
            torch.distributed.all_reduce(sums)
        total, right, images_seen = sums.tolist()
        return total / images_seen, right / images_seen

    def save(self) -> dict[str, bytes]:
        """A checkpoint, as files by name: the best weights as safetensors, and what continues the fit."""
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        stream = io.BytesIO()
        torch.save(state, stream)
        weights, progress = safetensors.torch.save(self.best_weights), json.dumps(self.progress()).encode()
        return {STATE: stream.getvalue(), WEIGHTS: weights, PROGRESS: progress}

    def progress(self) -> dict[str, object]:
        """Step, best epoch and history, as JSON values."""
        best = None if self.best is None else asdict(self.best)
        return {"step": self.step, "best": best, "history": [asdict(epoch) for epoch in self.history]}

    def load(self, files: Mapping[str, bytes]) -> None:
        """Go on from a checkpoint of the same recipe."""
        state = torch.load(io.BytesIO(files[STATE]), map_location=self.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        # Only what was accumulated: on another kind of device the optimiser has other options and layouts.
        options = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": options})
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter).copy_(value)
        self.scaler.load_state_dict(state["scaler"])
        self.best_weights = safetensors.torch.load(files[WEIGHTS])
        progress = json.loads(files[PROGRESS])
        self.step, self.best = progress["step"], Epoch(**progress["best"]) if progress["best"] else None
        self.history = [Epoch(**epoch) for epoch in progress["history"]]
