"""GPUs: what is needed of their memory, who shares one, and what is refused because it cannot fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedfactory_ray.classification.memory import fit_need
from fedfactory_ray.cluster.gpus import Gpu, Need, smallest
from fedfactory_ray.cluster.plan import Demand, fraction, make_plan, slots
from fedfactory_ray.data.partition import Partition
from fedfactory_ray.data.source import DataInfo, Task
from fedfactory_ray.errors import ResourcesError
from fedfactory_ray.generation.memory import drawing_need, module_need
from fedfactory_ray.pipeline import gpus
from fedfactory_ray.pipeline.gpus import Needs, client_demand, modules_here
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.data import SiloConfig
from fedfactory_ray.settings.places import ResourcesConfig
from fedfactory_ray.settings.presets import PUBLISHED_GENERATOR
from fedfactory_ray.settings.sections import ClassifierConfig, GeneratorConfig

GB = 10**9
H100 = Gpu(80 * GB, "bf16")
INFO = DataInfo([str(y) for y in range(10)], resolution=32, channels=3, counts={})
TINY_NEEDS = Needs(Need(GB // 5, 0), Need(GB // 5, 0), Need(GB // 5, 0))


# What is needed


def test_a_modules_need_is_what_an_h100_took() -> None:
    """15.5 GB with heads of 8 channels, which save as much as heads of 64."""
    need = module_need(GeneratorConfig(**PUBLISHED_GENERATOR), 3, 32, "bf16")
    assert need.of(256) / GB == pytest.approx(15.5, rel=0.1)
    assert drawing_need(need, 1).of(256) < need.of(256) / 2


def test_what_float32_needs_more() -> None:
    single, mixed = (module_need(GeneratorConfig(), 1, 8, precision) for precision in ("fp32", "bf16"))
    assert 1.5 * mixed.per_image < single.per_image < 2.5 * mixed.per_image


def test_a_fits_need_grows_with_its_network_and_its_batch() -> None:
    task = Task(classes=10, channels=3, resolution=32)
    small, large = (fit_need(ClassifierConfig(model=model), task, "bf16") for model in ("cnn", "resnet18"))
    assert small.of(256) < large.of(256) < 2 * large.of(128)
    assert 11.2e6 * 4 < large.fixed < 11.2e6 * 4 * 8


@pytest.mark.parametrize(
    ("generator", "room", "at_once"),
    [({}, 100, 8), ({}, 4, 3), ({"dropout": 0.1}, 100, 1), ({"channels": (128, 256), "batch_size": 4096}, 100, 1)],
    ids=["small", "little memory", "shared random numbers", "large"],
)
def test_a_process_of_its_own_trains_as_many_modules_as_its_gpu_has_room_for(
    monkeypatch: pytest.MonkeyPatch, generator: dict[str, Any], room: int, at_once: int
) -> None:
    config = Config.model_validate({"generator": generator | {"precision": "bf16"}})
    free = room * module_need(config.generator, INFO.channels, INFO.resolution, "bf16").of(config.generator.batch_size)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    assert modules_here(config, INFO, torch.device("cuda")) == at_once
    assert modules_here(config, INFO, torch.device("cpu")) == 1


# Who shares a GPU


@pytest.mark.parametrize(
    ("nodes", "demand", "num_gpus"),
    [
        ([{"CPU": 16.0, "GPU": 1.0}], Demand(10, 8), 0.125),
        ([{"CPU": 16.0, "GPU": 1.0}], Demand(10, 6), 0.1666),
        ([{"CPU": 16.0, "GPU": 1.0}], Demand(3, 8), 0.3333),  # no more shares than clients
        ([{"CPU": 16.0, "GPU": 1.0}], Demand(10, 1), 1.0),
        ([{"CPU": 2.0, "GPU": 2.0}], Demand(10, 8), 1.0),  # no GPU idles because two actors fit on the other
        ([{"CPU": 16.0, "GPU": 8.0}], Demand(10, 8), 0.5),
        ([{"CPU": 8.0}, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 2.0}], Demand(99, 8), 0.25),
        ([{"CPU": 8.0}], Demand(10, 8), 0.0),
    ],
)
def test_a_fraction_is_as_large_as_keeps_everybody_at_work(
    nodes: list[dict[str, float]], demand: Demand, num_gpus: float
) -> None:
    worker = make_plan(ResourcesConfig(), nodes, {"client": demand}).client
    assert worker.num_gpus == num_gpus
    assert worker.slots >= make_plan(ResourcesConfig(), nodes).client.slots


def test_shares_of_a_gpu_are_whole_ten_thousandths_that_fit() -> None:
    for sharing in range(1, 9):
        assert sharing * round(fraction(sharing) * 10_000) <= 10_000
        assert slots([{"CPU": 99, "GPU": 1}], 1, fraction(sharing)) == sharing


def test_numbers_that_are_given_stay() -> None:
    for given in (0, 0.5, 1):
        resources = ResourcesConfig.model_validate({"client": {"num_gpus": given}})
        assert make_plan(resources, [{"CPU": 8, "GPU": 1}], {"client": Demand(9, 8)}).client.num_gpus == given
    assert ResourcesConfig.model_validate({"client": {"num_gpus": None}}) == ResourcesConfig()
    for name in ("client", "synthesis"):
        with pytest.raises(ValidationError, match=r"a module is trained on one; .*classifier_workers"):
            ResourcesConfig.model_validate({name: {"num_gpus": 2}})


def test_the_smallest_gpu_that_may_be_given_counts() -> None:
    def node(name: str, gpu: float) -> dict[str, Any]:
        return {"NodeID": name, "Alive": True, "Labels": {"site": name}, "Resources": {"CPU": 4, "GPU": gpu}}

    nodes = [node("head", 0), node("north", 1), node("south", 1)]
    found = {"north": H100, "south": Gpu(16 * GB, "fp32")}
    assert smallest(nodes, found, ()) == Gpu(16 * GB, "fp32")
    silo = SiloConfig(name="a", source="a.npz", labels={"site": "north"})
    assert smallest(nodes, found, [silo]) == H100
    without = silo.model_copy(update={"labels": {"site": "head"}})
    config = Config.model_validate({"partition": {"scheme": "natural", "silos": [without]}})
    with pytest.raises(ResourcesError, match=r"no GPU on the 1 node\(s\) [\s\S]*'a'[\s\S]*resources.client.num_gpus=0"):
        gpus._refuse_silos_without_gpu(config, Partition(1, {"a": {0: np.arange(9)}}), nodes)


# What clients demand


def partition(clients: int, classes: int) -> Partition:
    return Partition(10, {f"client-{k}": {y: np.arange(50) for y in range(classes)} for k in range(clients)})


def demand(config: Config, needs: Needs, gpu: Gpu = H100, clients: int = 10, classes: int = 1) -> Demand:
    return client_demand(config, needs, gpu, INFO, partition(clients, classes))[0]


def test_small_clients_share_a_gpu_and_a_large_one_has_it_alone() -> None:
    small, large = TINY_NEEDS, Needs(Need(0, GB // 10), Need(0, 0), Need(0, 0))
    assert demand(Config(), small) == Demand(10, 8, 1)
    assert demand(Config(), small, Gpu(4 * GB, "bf16")).sharing == 3
    assert demand(Config(), small, classes=4) == Demand(10, 2, 4)  # its own modules side by side
    assert demand(Config(), small, classes=9) == Demand(10, 1, 8)
    assert demand(Config(), small, Gpu(2 * GB, "bf16"), classes=9).modules == 5  # what its GPU has room for
    assert demand(Config(generator=GeneratorConfig(dropout=0.1)), small, classes=9) == Demand(10, 8, 1)
    assert demand(Config(), large, classes=4) == Demand(10, 1, 1)
    assert demand(Config(), Needs(small.module, small.drawing, Need(5 * GB, 0))).sharing == 1  # an expert's fit


def test_a_module_that_cannot_fit_is_refused_with_the_images_that_would() -> None:
    needs = Needs(Need(GB, GB), Need(0, 0), Need(0, 0))  # 1 GB an image, of 64
    told = r"a GPU of 20.0 GB[\s\S]*65.8 GB to train a module, of which 64 images[\s\S]*generator.images_at_once=16\Z"
    with pytest.raises(ResourcesError, match=told):
        demand(Config(), needs, Gpu(20 * GB, "bf16"))
    fits = Config(generator=GeneratorConfig(images_at_once=16))
    assert demand(fits, needs, Gpu(20 * GB, "bf16")).sharing == 1
    with pytest.raises(ResourcesError, match="a smaller network, or larger GPUs"):
        demand(Config(), needs, Gpu(2 * GB, "bf16"))
    halves = fits.model_copy(update={"resources": ResourcesConfig.model_validate({"client": {"num_gpus": 0.5}})})
    told = r"20.0 GB[^\n]*, for 2 of them[\s\S]*resources.client.num_gpus=1 or generator.images_at_once=8\Z"
    with pytest.raises(ResourcesError, match=told):
        demand(halves, needs, Gpu(20 * GB, "bf16"))
    assert demand(halves, needs, Gpu(20 * GB, "bf16"), clients=1).sharing == 1
