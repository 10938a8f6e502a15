"""Whose canaries agree is not doubted; whose do not is named."""

from __future__ import annotations

import pytest

from fedfactory_ray.errors import UnlearningError
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.settings.config import Config
from fedfactory_ray.synthesis.shard import Shard
from fedfactory_ray.unlearning.doubts import SYNTHESIS, canary_doubts, refuse_doubts

HERE = {"a": "1" * 64, "b": "2" * 64, SYNTHESIS: "3" * 64}
"""Clients of two places, and whoever draws."""


def card(client: str, label: int, canary: str) -> ModuleCard:
    return ModuleCard(client, label, 5, 1, 8, 10, "fp32", {}, 100, canary, files={})


def shard(unit: int, canary: str) -> Shard:
    return Shard(f"unit-{unit}", "a", 0, unit, 8, "m", "r", "f", canary)


def test_what_these_workers_would_make_is_not_doubted() -> None:
    assert canary_doubts(Config(), [card("a", 0, "1" * 64), card("b", 0, "2" * 64)], [shard(0, "3" * 64)], HERE) == []


def test_what_others_made_is_named_with_both_canaries() -> None:
    cards = [card("a", label, "2" * 64) for label in range(7)] + [card("b", 0, ""), card("b", 1, "2" * 64)]
    found = canary_doubts(Config(), cards, [shard(0, "3" * 64), shard(1, f"{'3' * 64}+{'4' * 64}")], HERE)
    assert found == [
        "modules b/0 were made with canary unknown, here it is 222222222222…",
        "modules a/0, a/1, a/2, a/3, a/4 and 2 more were made with canary 222222222222…, here it is 111111111111…",
        "units unit-1 were made with canary 333333333333… + 444444444444…, here it is 333333333333…",
    ]
    with pytest.raises(UnlearningError, match=r"b/0[\s\S]*--allow-inexact"):
        refuse_doubts(Config(), found, allowed=False)
    refuse_doubts(Config(), found, allowed=True)


def test_modules_that_came_as_files_are_given_and_what_is_drawn_from_them_is_not() -> None:
    config = Config(modules="exchange", architecture="centralised", baselines=("none",))
    found = canary_doubts(config, [card("a", 0, "")], [shard(0, "")], {SYNTHESIS: "3" * 64})
    assert found == ["units unit-0 were made with canary unknown, here it is 333333333333…"]
