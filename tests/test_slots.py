"""Slots: who is served, and who is given up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from ray.exceptions import ActorUnschedulableError, RayError

from fedfactory_ray.cluster import absence
from fedfactory_ray.cluster.failures import find_refusal, reason
from fedfactory_ray.cluster.plan import Worker, placement, start_actor
from fedfactory_ray.cluster.slots import Slots
from fedfactory_ray.errors import ResourcesError
from fedfactory_ray.settings.config import Config


def test_a_silo_whose_nodes_stay_away_is_given_up_and_the_others_are_served(cluster: None) -> None:
    class Talker:
        def talk(self, client: str) -> Iterator[str]:
            yield f"{client} speaks"

    silos = [{"name": "gone", "source": "a.npz", "labels": {"site": "moon"}}, {"name": "here", "source": "b.npz"}]
    config = Config.model_validate(
        {"partition": {"scheme": "natural", "silos": silos}, "resources": {"away_seconds": 1.0}}
    )
    heard: list[str] = []
    failed: list[tuple[str, RayError, bool]] = []

    def begin(actor: Any, client: str) -> Any:
        return actor.talk.options(num_returns="streaming").remote(client)

    def fail(client: str, error: RayError, last: bool) -> bool:
        failed.append((client, error, last))
        return False

    def start(client: str) -> Any:
        return start_actor(Talker, num_cpus=1, **placement(config, client))

    actors = Slots(config, Worker(1.0, 0.0, 1, 2), start)
    actors.serve(["gone", "here"], begin, lambda client, event, stream: heard.append(event), fail)
    assert heard == ["here speaks"]
    ((client, error, last),) = failed
    assert (client, last) == ("gone", True)
    assert isinstance(error, ActorUnschedulableError)
    assert "for 1 s no node may read the silo of gone" in reason(error)
    assert isinstance(find_refusal(error), ResourcesError)  # what a run that cannot do without it says


def test_a_silo_that_came_back_has_its_whole_time_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, refused = [0.0], [True]
    AWAY = Config().resources.away_seconds

    def refuse(_: Any) -> None:
        if refused[0]:
            raise ResourcesError("no node", "a node", "a node")

    monkeypatch.setattr(absence, "refuse_unknown_places", refuse)
    monkeypatch.setattr(absence.time, "monotonic", lambda: clock[0])
    silos = [{"name": "north", "source": "a.npz"}]
    away = absence.Absence(Config.model_validate({"partition": {"scheme": "natural", "silos": silos}}))

    def gives_up(at: float, gone: bool) -> bool:
        clock[0], refused[0] = at, gone
        return "north" in away.given_up(["north"])

    assert not gives_up(0, True)
    assert not gives_up(AWAY - 1, True)
    assert not gives_up(AWAY, False)
    assert not gives_up(AWAY + 60, True)
    assert gives_up(2 * AWAY + 60, True)
    away.heard("north")
    assert not gives_up(2 * AWAY + 61, True)
