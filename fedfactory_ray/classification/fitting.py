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

from fedfactory_ray.classification.augment import augment_batch
from fedfactory_ray.classification.batches import Batches
from fedfactory_ray.classification.card import Epoch
from fedfactory_ray.classification.models import make_classifier
from fedfactory_ray.cluster.devices import autocast, resolve_precision, seed_process
from fedfactory_ray.data.source import Task
from fedfactory_ray.data.transforms import to_tensor
from fedfactory_ray.schedule import warmup_cosine
from fedfactory_ray.seeds import derive_seed
from fedfactory_ray.settings.sections import ClassifierConfig
from fedfactory_ray.storage.layout import PROGRESS, STATE, WEIGHTS

WARMUP = 0.05


def make_optimizer(config: ClassifierConfig, network: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimiser."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            network.parameters(),
            config.learning_rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=config.weight_decay,
        )
    return torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=config.weight_decay)


def _itself(network: nn.Module) -> nn.Module:
    return network


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
        self.network = make_classifier(recipe.model, task, recipe.norm).to(device)
        self.optimizer = make_optimizer(recipe, self.network)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.wrap = wrap
        self.step = 0
        self.history: list[Epoch] = []
        self.best: Epoch | None = None
        self.best_weights: dict[str, Tensor] = {}

    def epochs(self, training: Batches, validation: Batches, real: Batches | None = None) -> Iterator[Epoch]:
        """Fit epoch by epoch, going on behind the loaded checkpoint if there is one.

        `validation` chooses the epoch; what is told of `real` changes nothing. Raises FloatingPointError where no
        epoch has a finite validation loss.
        """
        model = self.wrap(self.network)
        for epoch in range(len(self.history), self.recipe.epochs):
            loss = self._train(model, training, epoch)
            validation_loss, accuracy = self._validate(validation)
            judged = self._validate(real) if real is not None else (None, None)
            done = Epoch(epoch + 1, self.recipe.epochs, loss, validation_loss, accuracy, *judged)
            self.history.append(done)
            better = self.best is None or done.validation_loss <= self.best.validation_loss
            if better and math.isfinite(done.validation_loss):
                self.best = done
                self.best_weights = {k: v.detach().cpu().clone() for k, v in self.network.state_dict().items()}
            yield done
        if self.best is None:
            raise FloatingPointError(
                f"the classifier's validation loss was never finite in {self.recipe.epochs} epochs: the fit diverged; "
                "try a smaller classifier.learning_rate"
            )

    def _train(self, model: nn.Module, training: Batches, epoch: int) -> float:
        # Generators of this epoch and rank: a resumed fit draws what an unbroken one draws.
        torch.manual_seed(derive_seed(self.seed, epoch, self.rank))
        draw = torch.Generator(self.device).manual_seed(derive_seed(self.seed, epoch, self.rank, "augment"))
        model.train()
        losses = []
        for images, labels in training.epoch(epoch):
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate * warmup_cosine(self.step, self.steps, WARMUP)
            inputs = augment_batch(to_tensor(images, self.device), self.recipe, draw)
            with autocast(self.device, self.precision):
                logits = model(inputs)
            loss = nn.functional.cross_entropy(
                logits.float(), labels.to(self.device), label_smoothing=self.recipe.label_smoothing
            )
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            losses.append(loss.detach())
            self.step += 1
        return float(torch.stack(losses).mean())

    @torch.inference_mode()
    def _validate(self, batches: Batches) -> tuple[float, float]:
        """Mean loss and accuracy of the validation rows, over all workers."""
        self.network.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        for images, labels in batches.epoch(None):
            with autocast(self.device, self.precision):
                logits = self.network(to_tensor(images, self.device)).float().cpu()
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            sums += torch.tensor([loss, (logits.argmax(1) == labels).sum(), len(labels)])
        if self.world > 1:
            sums = sums.to(self.device)
            torch.distributed.all_reduce(sums)
        total, right, count = sums.tolist()
        return total / count, right / count

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
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.best_weights = safetensors.torch.load(files[WEIGHTS])
        progress = json.loads(files[PROGRESS])
        self.step, self.best = progress["step"], Epoch(**progress["best"]) if progress["best"] else None
        self.history = [Epoch(**epoch) for epoch in progress["history"]]
