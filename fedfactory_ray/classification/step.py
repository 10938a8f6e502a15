"""The optimiser step of a fit, on whatever rows it is given: augmentation, loss, gradient, update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedfactory_ray.classification.augment import augment_batch
from fedfactory_ray.classification.fast import FastNetwork
from fedfactory_ray.classification.optimizers import SGD, AdamW
from fedfactory_ray.cluster.devices import autocast
from fedfactory_ray.data.transforms import to_tensor
from fedfactory_ray.settings.sections import ClassifierConfig


def make_optimizer(recipe: ClassifierConfig, network: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The recipe's optimiser; `initial_lr` is a group's peak learning rate. On a GPU its step is one kernel."""
    cuda = device.type == "cuda"
    parts = [(list(network.parameters()), 1)]
    if isinstance(network, FastNetwork) and recipe.optimizer == "sgd":
        parts = network.parts()
    groups: list[dict[str, Any]] = []
    for parameters, scale in parts:
        peak = recipe.learning_rate * scale
        # A CUDA graph repeats the numbers that it was captured with, but reads a tensor anew.
        rate = torch.tensor(peak, device=device) if cuda else peak
        decay = recipe.weight_decay / scale
        groups.append({"params": parameters, "lr": rate, "initial_lr": peak, "weight_decay": decay})
    if recipe.optimizer == "sgd":
        return SGD(groups, momentum=0.9, nesterov=True, fused=cuda or None)
    return AdamW(groups, fused=cuda or None, capturable=cuda)


class Step:
    """An optimiser step of `model`, which may be a wrapped network, by the recipe, on the device of `draw`, which
    augments. It waits for nothing, and on a GPU can be captured."""

    def __init__(
        self,
        recipe: ClassifierConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        precision: str,
        draw: torch.Generator,
    ) -> None:
        self.recipe, self.model, self.optimizer, self.scaler = recipe, model, optimizer, scaler
        self.precision, self.draw, self.device = precision, draw, draw.device
        self.rows: tuple[Tensor, ...] = ()

    def put(self, images: Tensor, labels: Tensor, share: float) -> None:
        """Have the next step take these uint8 images (n, H, W, C) and int64 labels (n,), as many each time, and this
        share of the peak learning rate."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(group["initial_lr"] * share)
            else:
                group["lr"] = group["initial_lr"] * share
        if self.device.type == "cpu":
            self.rows = (images, labels)
            return
        # Always in the same place, where a replayed step reads them.
        self.rows = self.rows or tuple(torch.empty_like(each, device=self.device) for each in (images, labels))
        for place, each in zip(self.rows, (images, labels), strict=True):
            place.copy_(each, non_blocking=True)

    def __call__(self) -> Tensor:
        """Take the step; returns the loss, a scalar on the device."""
        images, labels = self.rows
        inputs = augment_batch(to_tensor(images, self.device), self.recipe, self.draw)
        with autocast(self.device, self.precision):
            logits = self.model(inputs)
        loss = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()
