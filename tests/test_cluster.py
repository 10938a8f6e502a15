"""Planning: what fits side by side, and what is refused because it would wait for ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedfactory_ray.cluster.devices import assigned_device
from fedfactory_ray.cluster.plan import make_plan, placement, refuse_unknown_places, slots
from fedfactory_ray.errors import ResourcesError
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.data import SiloConfig
from fedfactory_ray.settings.places import ResourcesConfig

LAPTOP = [{"CPU": 2.0}]
GPUS = [{"CPU": 8.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 4.0}]


@pytest.mark.parametrize(
    ("nodes", "num_cpus", "num_gpus", "fits"),
    [
        (LAPTOP, 1, 0, 2),
        (LAPTOP, 0.5, 0, 4),
        (LAPTOP, 3, 0, 0),
        (LAPTOP, 1, 1, 0),
        (GPUS, 1, 1, 3),  # two, and one for the one CPU of the last node
        (GPUS, 1, 0.5, 5),
        (GPUS, 0.25, 0.4, 8),  # no actor takes parts of two devices
        (GPUS, 4, 0, 6),
    ],
)
def test_workers_fit_node_by_node(nodes: Any, num_cpus: float, num_gpus: float, fits: int) -> None:
    assert slots(nodes, num_cpus, num_gpus) == fits


def test_gpus_are_asked_for_where_there_are_any() -> None:
    assert {phase.num_gpus for phase in vars(make_plan(ResourcesConfig(), LAPTOP)).values()} == {0.0}
    plan = make_plan(ResourcesConfig(), GPUS)
    assert {phase.num_gpus for phase in vars(plan).values()} == {1.0}
    assert plan.client.slots == 3
    assert make_plan(ResourcesConfig(max_actors=2), GPUS).client.slots == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"client": {"num_gpus": 1}}, r"1 node\(s\) with 2 CPUs and 0 GPUs[\s\S]*resources.client; room for 0"),
        ({"classifier_workers": 3}, r"3 × \(1 CPUs, 0 GPUs\) for resources.classifier; room for 2"),
        ({"classifier_workers": 2}, r"2 × 1 CPUs to fit and 1 to read data"),
        ({"synthesis": {"num_cpus": 5}}, r"resources.synthesis; room for 0"),
    ],
)
def test_a_plan_that_would_wait_for_ever_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ResourcesError, match=message):
        make_plan(ResourcesConfig(**settings), LAPTOP, streams=True)


def test_one_cpu_is_enough_where_workers_hold_their_rows() -> None:
    plan = make_plan(ResourcesConfig(), [{"CPU": 1.0}])
    assert {worker.slots for worker in vars(plan).values()} == {1}
    with pytest.raises(ResourcesError, match=r"in_memory_mb"):
        make_plan(ResourcesConfig(), [{"CPU": 1.0}], streams=True)


def node(labels: dict[str, str], alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Labels": labels, "Resources": {"CPU": 4.0} | resources}


def test_silos_are_held_to_their_nodes() -> None:
    labelled = SiloConfig(name="north", source="a.npz", labels={"site": "north"})
    held = SiloConfig(name="south", source="b.npz", resources={"south": 0.01})
    config = Config.model_validate({"partition": {"scheme": "natural", "silos": [labelled, held]}})
    assert placement(config, "north") == {"resources": {}, "label_selector": {"site": "north"}}
    assert placement(config, "south") == {"resources": {"south": 0.01}}
    assert placement(config, "west") == {}
    nodes = [node({"site": "north"}), node({}, south=1.0)]
    refuse_unknown_places([labelled, held], nodes)
    with pytest.raises(ResourcesError, match=r"client 'south'"):
        refuse_unknown_places([labelled, held], nodes[:1])
    with pytest.raises(ResourcesError, match=r"none with labels \{'site': 'north'\}[\s\S]*client 'north'"):
        refuse_unknown_places([labelled], [node({"site": "north"}, alive=False), node({"site": "east"})])


def test_a_process_without_an_assigned_gpu_computes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert assigned_device([]) == torch.device("cpu")
    assert assigned_device(["3"]) == torch.device("cuda", 0)


def test_an_assigned_gpu_that_torch_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ResourcesError, match=r"GPU 3 assigned by Ray"):
        assigned_device(["3"])
