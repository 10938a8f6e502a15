"""Local only: every client fits the classifier on its own images and federates nothing."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from fedfactory_ray.classification.card import verified_card
from fedfactory_ray.config import Config
from fedfactory_ray.sections import ClassifierConfig
from fedfactory_ray.storage import Storage

if TYPE_CHECKING:
    from fedfactory_ray.baselines.rounds import Federation


@dataclass(frozen=True)
class Alone:
    """A client's own classifier in storage."""

    client: str
    folder: str
    sha256: str
    epoch: int


def alone_recipe(config: Config, images: int, all_images: int) -> ClassifierConfig:
    """The recipe for a client of `images` training images: as many optimiser steps as the centralised fit of
    `all_images` takes, so that a small client is not merely trained for less long."""
    recipe = config.classifier
    steps = recipe.epochs * max(1, all_images // recipe.batch_size)
    own = images // min(recipe.batch_size, images)
    return recipe.model_copy(update={"epochs": math.ceil(steps / own)})


def fit_alone(federation: Federation, listen: Callable[[int], None]) -> list[Alone]:
    """Every client's classifier, under classifier/local-<client>; `listen` is told how many are there.

    What an earlier start fitted with the same settings is not fitted again.
    """
    config, storage, partition = federation.config, federation.storage, federation.partition
    every = config.federated.validation_every
    content = [partition.sha256, config.data.source, config.classifier.model_dump(mode="json"), every, config.seed]
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    done = {client: stored_alone(storage, client, fingerprint) for client in partition.clients}
    total = sum(federation.images.values())
    waiting = [
        federation.slot[client].fit_alone.remote(
            client, alone_recipe(config, federation.images[client], total), storage, fingerprint
        )
        for client, found in done.items()
        if found is None
    ]
    while waiting:
        listen(len(done) - len(waiting))
        (ready, *_), waiting = ray.wait(waiting)
        fitted: Alone = ray.get(ready)
        done[fitted.client] = fitted
    return [fitted for fitted in done.values() if fitted is not None]


def stored_alone(storage: Storage, client: str, fingerprint: str) -> Alone | None:
    """The client's classifier of an earlier start, if it was made by these settings and verifies."""
    folder = f"classifier/local-{client}"
    card = verified_card(storage, folder, fingerprint)
    if card is None:
        return None
    return Alone(client, folder, card["sha256"], card["epoch"])
