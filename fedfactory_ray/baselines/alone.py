"""Local only: every client fits the classifier on its own images and federates nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fedfactory_ray.baselines.card import Alone
from fedfactory_ray.baselines.centralised import baseline_steps, for_steps
from fedfactory_ray.cluster.absence import replies_of
from fedfactory_ray.cluster.stored import find_all
from fedfactory_ray.storage.artefact import fingerprint
from fedfactory_ray.storage.layout import classifier_folder, lone_classifier

if TYPE_CHECKING:
    from fedfactory_ray.baselines.rounds import Federation


def fit_alone(federation: Federation, listen: Callable[[int], None]) -> list[Alone]:
    """Every client's classifier, under classifier/local-<client>; `listen` is told how many are there.

    Each takes as many optimiser steps as the centralised fit, so that no client loses by being trained for less long.
    What an earlier start fitted with the same settings is not fitted again.
    """
    config, storage, partition = federation.config, federation.storage, federation.partition
    every = config.federated.validation_every
    steps = baseline_steps(config, partition)
    settings = [config.classifier.model_dump(mode="json"), steps, every, config.resources.client.threads, config.seed]
    made_of = fingerprint(Alone.kind, partition.content, settings)
    wanted = {classifier_folder(lone_classifier(client)): made_of for client in partition.clients}
    done = {alone.client: alone for alone in find_all(storage, Alone, wanted).values()}
    asked = {
        federation.slot[client].fit_alone.remote(
            client, for_steps(config.classifier, federation.n_images[client], steps), storage, made_of
        ): client
        for client in partition.clients
        if client not in done
    }
    for there, fitted in enumerate(replies_of(asked, config), len(done) + 1):
        done[fitted.client] = fitted
        listen(there)
    return [done[client] for client in partition.clients]
