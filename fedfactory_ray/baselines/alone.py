"""Local only: every client fits the classifier on its own images and federates nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from fedfactory_ray.baselines.centralised import baseline_steps, for_steps
from fedfactory_ray.baselines.client import Alone
from fedfactory_ray.classification.card import verified_card
from fedfactory_ray.storage.files import Storage

if TYPE_CHECKING:
    from fedfactory_ray.baselines.rounds import Federation


def fit_alone(federation: Federation, listen: Callable[[int], None]) -> list[Alone]:
    """Every client's classifier, under classifier/local-<client>; `listen` is told how many are there.

    Each takes as many optimiser steps as the centralised fit, lest a small client be merely trained for less long.
    What an earlier start fitted with the same settings is not fitted again.
    """
    config, storage, partition = federation.config, federation.storage, federation.partition
    every = config.federated.validation_every
    steps = baseline_steps(config, partition)
    recipe = config.classifier.model_dump(mode="json")
    content = [partition.sha256, config.data.source, recipe, steps, every, config.seed]
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    done = {client: stored_alone(storage, client, fingerprint) for client in partition.clients}
    asked = {
        federation.slot[client].fit_alone.remote(
            client, for_steps(config.classifier, federation.images[client], steps), storage, fingerprint
        ): client
        for client, found in done.items()
        if found is None
    }
    for there, fitted in enumerate(federation.replies(asked), len(done) - len(asked) + 1):
        done[fitted.client] = fitted
        listen(there)
    return [fitted for fitted in done.values() if fitted is not None]


def stored_alone(storage: Storage, client: str, fingerprint: str) -> Alone | None:
    """The client's classifier of an earlier start, if it was made by these settings and verifies."""
    folder = f"classifier/local-{client}"
    card = verified_card(storage, folder, fingerprint)
    if card is None:
        return None
    return Alone(client, folder, card["sha256"], card["epoch"])
