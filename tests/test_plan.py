import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fedfactory_ray.classification.sides import validates
from fedfactory_ray.data.partition import Partition
from fedfactory_ray.errors import ConfigError
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.generation.noise import attempts
from fedfactory_ray.generation.sampling import image_noise
from fedfactory_ray.settings.config import Config
from fedfactory_ray.synthesis.plan import Unit, check_fraction, check_validation, make_units, quotas, unit_seed

holdings = st.dictionaries(
    st.sampled_from([f"client-{k:03d}" for k in range(12)]), st.integers(1, 500), min_size=1, max_size=8
)


def card(client: str, label: int, images: int = 10) -> ModuleCard:
    files = {"model.safetensors": f"sha-{client}-{label}"}
    return ModuleCard(client, label, images, 1, 8, 30, "fp32", {}, 100, files=files)


def cards_of(*matrices: dict[str, int]) -> list[ModuleCard]:
    """A card for each client and class: one dictionary of image counts a class."""
    return [card(client, label, n) for label, counts in enumerate(matrices) for client, n in counts.items()]


def by_key(units: list[Unit]) -> dict[tuple[str, int, int], Unit]:
    return {(unit.client, unit.label, unit.index): unit for unit in units}


# Quotas


@settings(max_examples=200, deadline=None)
@given(holdings, st.integers(0, 5000))
def test_quotas_sum_to_the_total_and_no_other_image_would_be_fairer(counts: dict[str, int], total: int) -> None:
    shares = quotas(counts, total)
    assert sum(shares.values()) == total
    assert shares.keys() == counts.keys()
    # Webster's criterion: nobody's last image was due later than anybody's next one.
    last = max(((2 * shares[c] - 1) / n for c, n in counts.items()), default=0)
    following = min((2 * shares[c] + 1) / n for c, n in counts.items())
    assert last <= following


@settings(max_examples=100, deadline=None)
@given(holdings, st.integers(0, 5000), st.randoms(use_true_random=False))
def test_quotas_do_not_depend_on_the_order_of_clients(counts: dict[str, int], total: int, random: object) -> None:
    items = list(counts.items())
    random.shuffle(items)  # type: ignore[attr-defined]
    assert quotas(dict(items), total) == quotas(counts, total)


def test_ties_go_to_the_first_name() -> None:
    assert quotas({"b": 5, "a": 5, "c": 5}, 4) == {"b": 1, "a": 2, "c": 1}
    assert quotas({"c": 5, "b": 5, "a": 5}, 5) == {"c": 1, "b": 2, "a": 2}


def test_quotas_follow_the_counts() -> None:
    assert quotas({"a": 10, "b": 26, "c": 64}, 10) == {"a": 1, "b": 3, "c": 6}
    assert quotas({"a": 30, "b": 70}, 1000) == {"a": 300, "b": 700}


@settings(max_examples=200, deadline=None)
@given(holdings.filter(lambda counts: len(counts) > 1), st.integers(0, 300))
def test_when_a_client_goes_the_others_only_gain(counts: dict[str, int], total: int) -> None:
    before = quotas(counts, total)
    gone = min(counts)
    after = quotas({client: n for client, n in counts.items() if client != gone}, total)
    assert all(after[client] >= before[client] for client in after)


@settings(max_examples=200, deadline=None)
@given(holdings, st.integers(0, 300))
@example({"client-000": 1, "client-001": 9, "client-002": 31}, 25)  # the Alabama paradox
def test_a_larger_total_takes_no_image_from_any_client(counts: dict[str, int], total: int) -> None:
    now, later = quotas(counts, total), quotas(counts, total + 1)
    assert all(later[client] >= now[client] for client in counts)


# Units


@settings(max_examples=100, deadline=None)
@given(st.lists(holdings, min_size=1, max_size=4), st.integers(2, 900), st.integers(1, 300), st.integers(0, 9))
def test_units_cover_the_quotas(matrices: list[dict[str, int]], images: int, unit_size: int, seed: int) -> None:
    units = make_units(cards_of(*matrices), images, unit_size, seed)
    for label, counts in enumerate(matrices):
        shares = quotas(counts, images)
        for client, share in shares.items():
            own = [unit for unit in units if (unit.client, unit.label) == (client, label)]
            assert sum(unit.n for unit in own) == share
            assert [unit.index for unit in own] == list(range(len(own)))
            assert all(unit.n == unit_size for unit in own[:-1])
            assert all(0 < unit.n <= unit_size for unit in own)
            assert all(unit.module_sha256 == f"sha-{client}-{label}" for unit in own)
    assert sum(unit.n for unit in units) == images * len(matrices)
    assert [(u.label, u.client, u.index) for u in units] == sorted((u.label, u.client, u.index) for u in units)


@settings(max_examples=60, deadline=None)
@given(st.lists(holdings, min_size=1, max_size=3), st.integers(2, 600), st.integers(1, 100))
def test_files_and_seeds_are_a_units_own(matrices: list[dict[str, int]], images: int, unit_size: int) -> None:
    units = make_units(cards_of(*matrices), images, unit_size, 0)
    assert len({unit.file for unit in units}) == len({unit.seed for unit in units}) == len(units)
    assert all(0 <= unit.seed < 2**63 for unit in units)


@settings(max_examples=60, deadline=None)
@given(holdings, st.integers(2, 300), st.integers(0, 300), st.integers(1, 40))
def test_seeds_and_files_stay_when_images_per_class_grow(
    counts: dict[str, int], images: int, more: int, unit_size: int
) -> None:
    now = by_key(make_units(cards_of(counts), images, unit_size, 0))
    later = by_key(make_units(cards_of(counts), images + more, unit_size, 0))
    for key in now.keys() & later.keys():
        assert (now[key].seed, now[key].file) == (later[key].seed, later[key].file)


@settings(max_examples=100, deadline=None)
@given(holdings, st.integers(2, 300), st.integers(1, 300), st.integers(1, 40))
@example({"client-000": 2, "client-001": 6, "client-002": 6}, 3, 1, 1)  # the Alabama paradox
def test_growing_images_per_class_only_appends(counts: dict[str, int], images: int, more: int, unit_size: int) -> None:
    now = by_key(make_units(cards_of(counts), images, unit_size, 0))
    later = by_key(make_units(cards_of(counts), images + more, unit_size, 0))
    assert now.keys() <= later.keys()
    assert all(later[key].n >= unit.n for key, unit in now.items())


def test_a_single_holders_full_units_stay_as_they_are_when_images_per_class_grow() -> None:
    now, later = (make_units(cards_of({"a": 9}, {"b": 9}), images, 100, 0) for images in (300, 450))
    assert set(now) < set(later)
    assert len(later) - len(now) == 4


@settings(max_examples=60, deadline=None)
@given(holdings, holdings, st.integers(2, 300), st.integers(1, 50))
def test_other_clients_do_not_change_a_units_seed(
    counts: dict[str, int], others: dict[str, int], images: int, unit_size: int
) -> None:
    assume(counts.keys() != others.keys())
    alone = by_key(make_units(cards_of(counts), images, unit_size, 0))
    together = by_key(make_units(cards_of(counts | others, others), images, unit_size, 0))
    for key in alone.keys() & together.keys():
        assert (alone[key].seed, alone[key].file) == (together[key].seed, together[key].file)


def test_other_classes_do_not_change_a_classs_units() -> None:
    one = make_units(cards_of({"a": 5, "b": 7}), 50, 10, 0)
    two = make_units(cards_of({"a": 5, "b": 7}, {"a": 3}), 50, 10, 0)
    assert [unit for unit in two if unit.label == 0] == one


def test_the_order_of_cards_does_not_matter() -> None:
    cards = cards_of({"a": 5, "b": 7}, {"b": 2, "c": 2})
    assert make_units(cards, 50, 10, 0) == make_units(reversed(cards), 50, 10, 0)


def test_another_seed_of_the_run_changes_every_units_seed() -> None:
    cards = cards_of({"a": 5, "b": 7})
    first, other = make_units(cards, 50, 10, 0), make_units(cards, 50, 10, 1)
    assert not {unit.seed for unit in first} & {unit.seed for unit in other}
    assert [replace(unit, seed=0) for unit in first] == [replace(unit, seed=0) for unit in other]


def test_seeds_are_the_same_on_every_machine() -> None:
    unit = make_units([card("client-001", 2)], 10, 10, 7)[0]
    text = "1:7,9:synthesis,10:client-001,1:2,1:0,"
    assert unit.seed == int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") // 2


@pytest.mark.parametrize(("label", "index"), [(0, 0), (12, 345)])
def test_a_units_file_names_class_client_and_index(label: int, index: int) -> None:
    unit = Unit("client-003", label, index, 10, 1, "f00d")
    assert unit.file == f"synthetic/class-{label:03d}/client-003-{index:05d}.parquet"


def test_a_plan_of_which_a_class_has_no_validating_image_is_refused() -> None:
    def check(
        held: dict[str, dict[int, int]], images: int, fraction: float = 0.1, exclude: tuple[str, ...] = ()
    ) -> None:
        config = Config.model_validate(
            {
                "synthesis": {"images_per_class": images, "batch_size": 2, "unit_size": 4},
                "classifier": {"validation_fraction": fraction},
                "partition": {"exclude": exclude},
                "generator": {"min_images": 1},
            }
        )
        shares = {client: {y: np.arange(n) for y, n in share.items()} for client, share in held.items()}
        check_validation(config, Partition(3, shares))

    many = {f"client-{i:03d}": {0: 7, 1: 7} for i in range(100)}
    with pytest.raises(ConfigError, match=r"at most 5 images of class 0 (.|\n)*class 1 (.|\n)*about 1000 images"):
        check(many, 500)
    check(many, 1000)
    check(many, 500, 0.2)
    # One client that draws enough is enough; a class that nobody holds asks for nothing.
    check({"a": {0: 90}, "b": {0: 1, 2: 1}}, 10)
    with pytest.raises(ConfigError, match="at most 9 images"):
        check({"a": {0: 50}}, 9)
    # Where the largest holder is forgotten, fewer are drawn from each of the others.
    others = {f"client-{i:03d}": {0: 5} for i in range(100)}
    check({"large": {0: 500}} | others, 30)
    check(others, 30, exclude=("large",))


@pytest.mark.parametrize(
    ("fraction", "told"),
    [(0.4, "act as 0.5; needed 0.5 or 0.3333"), (0.45, "0.5 or 0.3333"), (0.15, "0.1667 or 0.1429")],
)
def test_a_share_that_would_act_as_another_is_refused(fraction: float, told: str) -> None:
    config = Config.model_validate({"classifier": {"validation_fraction": fraction}})
    with pytest.raises(ConfigError, match=told):
        check_fraction(config)
    exclude = {"partition": {"exclude": ["client-000"]}}
    check_fraction(Config.model_validate(config.model_dump(mode="json") | exclude))  # its run was accepted once


@pytest.mark.parametrize("fraction", [0.5, 0.33, 1 / 3, 0.25, 0.2, 0.1, 0.05])
def test_a_share_that_is_one_in_a_whole_number_is_kept(fraction: float) -> None:
    check_fraction(Config.model_validate({"classifier": {"validation_fraction": fraction}}))
    judged = validates(np.arange(3000), fraction)
    assert judged.mean() == pytest.approx(fraction, rel=0.02)


# Noise


def test_images_of_a_module_that_torch_would_give_equal_noise_get_noise_of_their_own() -> None:
    """Seed 7, client-007, class 7: images 206 and 2629, of units of 1000."""
    config = Config.model_validate({"seed": 7, "synthesis": {"batch_size": 125, "unit_size": 1000}})
    units = [Unit("client-007", 7, index, 1000, unit_seed(7, "client-007", 7, index), "f00d") for index in range(3)]
    assert [unit.attempts(config) for unit in units] == [{}, {}, {629: 1}]
    first, other = image_noise(units[0].seed, 206, (1, 8, 8)), image_noise(units[2].seed, 629, (1, 8, 8))
    assert torch.equal(first, other), "as it was"
    assert not torch.equal(first, image_noise(units[2].seed, 629, (1, 8, 8), 1))
    card = ModuleCard("client-007", 7, 40, 1, 8, 30, "fp32", {}, 1, files={})
    elsewhere = config.model_copy(update={"seed": 8})
    assert units[2].fingerprint(config, card) != units[2].fingerprint(elsewhere, card), "such a unit is drawn again"
    assert units[1].fingerprint(config, card) == units[1].fingerprint(elsewhere, card)


def test_noise_of_images_does_not_depend_on_later_ones() -> None:
    # Seeds that torch tells apart by nothing: the second unit repeats the first.
    assert attempts([3, 3], 4) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert attempts([3], 4) == {}
    assert attempts([3, 3, 3], 2) == {0: 2, 1: 2}
