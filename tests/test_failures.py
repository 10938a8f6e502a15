"""A GPU without memory: a refusal that names who, what and the mend, and is not tried again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from fedfactory_ray.baselines import client as baselines_client
from fedfactory_ray.baselines.client import FederatedClient
from fedfactory_ray.baselines.methods import METHODS
from fedfactory_ray.classification.rows import Rows
from fedfactory_ray.classification.training import fit
from fedfactory_ray.cluster.failures import failures_refused, find_refusal
from fedfactory_ray.cluster.plan import Worker, start_actor
from fedfactory_ray.data.readers import open_source
from fedfactory_ray.data.source import Task
from fedfactory_ray.errors import GpuMemoryError
from fedfactory_ray.federation import experts
from fedfactory_ray.federation.client import train_share
from fedfactory_ray.federation.expert import Assignment
from fedfactory_ray.generation import training
from fedfactory_ray.generation.card import ModuleCard, ModuleHandle
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.synthesis.plan import Unit
from fedfactory_ray.synthesis.synthesize import Synthesizer

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB.\nThe rest is long."
TASK = Task(classes=10, channels=1, resolution=8)
WORKER = Worker(1.0, 0.0, 1, 1)
CPU = torch.device("cpu")


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError(FULL)


def test_only_a_lack_of_memory_becomes_a_refusal_which_travels() -> None:
    told = r"client 'a'.\n  found:  CUDA[^\n]*2.00 GiB.\n  try:    less"
    with pytest.raises(GpuMemoryError, match=told) as caught, failures_refused("client 'a'", "less"):
        out_of_memory()
    assert str(copy.copy(caught.value)) == str(caught.value)
    with pytest.raises(RuntimeError, match="another"), failures_refused("client 'a'", "less"):
        raise RuntimeError("another")


def test_a_client_names_the_class_whose_module_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.Training, "descend", out_of_memory)
    config, share = Config(), {3: np.arange(20)}
    source = open_source(config.data)
    with pytest.raises(GpuMemoryError, match=r"'a', class 3, training its module[\s\S]*generator.images_at_once"):
        list(train_share(config, source, "a", share, CPU, Storage(str(tmp_path))))


def test_a_federated_client_names_the_round(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines_client, "train_locally", out_of_memory)
    config = Config()
    client, method = (
        FederatedClient(config, TASK, 1, {"a": {3: np.arange(20)}}, np.ones(10)),
        METHODS["fedavg"](config.federated),
    )
    model = baselines_client.to_message(client.learner.model())
    with pytest.raises(GpuMemoryError, match=r"'a', training in round 2[\s\S]*classifier.batch_size"):
        client.train("a", method, 2, model, b"", b"")
    monkeypatch.setattr(client.learner, "judge", out_of_memory)
    with pytest.raises(GpuMemoryError, match="'a', judging"):
        client.validate("a", model)


def test_synthesis_names_the_module(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Synthesizer, "drawing", out_of_memory)
    card = ModuleCard("a", 3, 20, 1, 8, 30, "fp32", {}, 100, files={})
    drawing = Synthesizer(Config(), 1, Storage(str(tmp_path)), {card.key: ModuleHandle(card)})
    with pytest.raises(GpuMemoryError, match=r"client 'a', class 3[\s\S]*synthesis.batch_size"):
        drawing.draw(Unit("a", 3, 0, 10, 1, "f00d"))


def test_an_expert_without_memory_ends_the_run_instead_of_being_missed(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = tmp_path / "begun"

    class Full:
        def fit_expert(self, assignment: Assignment) -> Iterator[Any]:
            with begun.open("a") as log:
                log.write(assignment.client)
            yield from ()
            raise GpuMemoryError(f"client {assignment.client!r}", "full", "less")

    monkeypatch.setattr(experts, "start_client", lambda *_: start_actor(Full, num_cpus=1))
    assignments = [Assignment(client, {0: np.arange(5)}, (), 0, TASK) for client in "ab"]
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        experts.collect_experts(Config(), assignments, WORKER, Storage(str(tmp_path)), lambda *_: None)
    assert isinstance(find_refusal(caught.value), GpuMemoryError)
    assert begun.read_text() == "a"


def test_a_fit_without_memory_is_not_tried_again(cluster: None, tmp_path: Path) -> None:
    begun = tmp_path / "begun"

    def table() -> pa.Table:
        with begun.open("a") as log:
            log.write("x")
        raise torch.OutOfMemoryError(FULL)

    rows = Rows(table, lambda: None, "digest", 240, 60)  # type: ignore[arg-type, return-value]
    with pytest.raises(GpuMemoryError, match=r"the fit of here[\s\S]*2.00 GiB[\s\S]*classifier.batch_size"):
        fit(Config(), rows, TASK, WORKER, Storage(str(tmp_path)), "here", lambda _: None)
    assert begun.read_text() == "x"
