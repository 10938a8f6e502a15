"""The search: which settings a study tries, and which it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from fedfactory_ray.errors import ConfigError
from fedfactory_ray.settings.command_line import make_config
from fedfactory_ray.tuning.search import Dimension, configured, draw_settings, overrides, parse_search
from fedfactory_ray.tuning.study import make_trials

ALL = ("seed", "data", "partition", "classifier", "federated", "generator", "sampler", "synthesis")


def settings_of(*search: str, trials: int | None = None, seed: int = 0) -> list[dict[str, str]]:
    return [dict(s) for s in draw_settings(parse_search(search, make_config(), ALL), trials, seed)]


def test_choices_alone_make_the_whole_grid_in_order() -> None:
    found = settings_of("sampler.solver=dpmpp,heun", "generator.channels=[16,32],[32,64]")
    assert [tuple(s.values()) for s in found] == [
        ("dpmpp", "[16,32]"),
        ("dpmpp", "[32,64]"),
        ("heun", "[16,32]"),
        ("heun", "[32,64]"),
    ]
    assert configured(make_config(), found[3]).generator.channels == (32, 64)


def test_settings_are_a_function_of_search_and_seed_and_more_trials_only_add() -> None:
    search = ("federated.fedprox_lr=0.003..0.3", "federated.prox_mu=0,0.01,1")
    assert len(settings_of(*search)) == 8
    assert settings_of(*search, trials=12)[:5] == settings_of(*search, trials=5) == settings_of(*search, trials=5)
    assert settings_of(*search, seed=1) != settings_of(*search)
    other_order = settings_of(*reversed(search))
    assert [s["federated.fedprox_lr"] for s in other_order] == [s["federated.fedprox_lr"] for s in settings_of(*search)]
    few = settings_of("sampler.evaluations=6,10,20", "sampler.solver=dpmpp,heun", trials=4)
    assert len({tuple(s.values()) for s in few}) == 4


def test_a_range_is_drawn_in_the_logarithm_where_it_spans_a_factor_of_ten() -> None:
    state = np.random.RandomState(0)
    wide, narrow = Dimension("x", (), 0.001, 10), Dimension("x", (), 1, 9)
    assert np.median([float(wide.draw(state)) for _ in range(400)]) == pytest.approx(0.1, rel=0.5)
    assert np.median([float(narrow.draw(state)) for _ in range(400)]) == pytest.approx(5, rel=0.15)
    whole = {Dimension("x", (), 2, 4, whole=True).draw(state) for _ in range(50)}
    assert whole == {"2", "3", "4"}
    near = Dimension("x", (), 0.9990, 0.9999)
    assert all(0.999 <= float(near.draw(state)) <= 0.9999 for _ in range(50))


def test_whole_numbers_that_run_out_end_the_search() -> None:
    assert sorted(settings_of("sampler.evaluations=6..8", trials=20), key=str) == [
        {"sampler.evaluations": n} for n in ("6", "7", "8")
    ]


def test_settings_read_as_yaml_and_paste_as_arguments() -> None:
    settings = {"generator.half_precision_upload": "false", "data.resolution": "null", "classifier.shift": "0.2"}
    config = configured(make_config(overrides=["--data.resolution", "16"]), settings)
    assert (config.generator.half_precision_upload, config.data.resolution) == (False, None)
    assert overrides(settings) == "--no-generator.half_precision_upload --classifier.shift 0.2"
    assert make_config(overrides=overrides(settings).split()).classifier.shift == 0.2


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (["federated.client_rl=1"], "found 'federated.client_rl', needed a setting"),
        (["storage.uri=a,b"], "needed a setting .* of seed, data, partition, classifier, federated"),
        (["generator.epochs=1,2"], "found 'generator.epochs'"),  # matters to the factory alone
        (["federated.fedavg_lr=0.1,-1"], "fedavg_lr: Input should be greater than 0"),
        (["federated.fedavg_lr=0..1"], "fedavg_lr: Input should be greater than 0"),
        (["federated.fedprox_lr=1..0.1"], "from 1 to 0.1, needed low..high"),
        (["federated.rounds=1.5..3"], "federated.rounds: Input should be a valid integer"),
        (["data.download=0..1"], "needed choices: data.download is no number"),
        (["federated.fedprox_lr=0.1,,1"], "found an empty value"),
        (["federated.fedprox_lr=[1"], "federated.fedprox_lr"),
        (["seed=1,2", "seed=3"], "searched twice"),
        (["partition.min_size=0", "classifier.blur=2"], "min_size(.|\n)*classifier.blur"),
        ([], "found none, needed at least one"),
    ],
)
def test_what_cannot_be_tried_is_refused_with_every_reason(search: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_trials(make_config(), "fedprox", search, None)


def test_settings_that_do_not_go_together_are_refused_with_their_names() -> None:
    config = make_config(overrides=["--synthesis.batch_size", "1"])
    search = ["synthesis.batch_size=1,2", "synthesis.unit_size=3,4"]
    with pytest.raises(ConfigError, match=r"batch_size 2 --synthesis.unit_size 3: .*unit_size=3 needs to be"):
        make_trials(config, "fedfactory", search, None)


def test_methods_that_cannot_be_tuned_are_refused() -> None:
    for method in ("local", "fedsgd"):
        with pytest.raises(ConfigError, match=f"found '{method}', needed one of fedavg, fedprox"):
            make_trials(make_config(), method, ["seed=1,2"], None)
    with pytest.raises(ConfigError, match="--trials: found 0"):
        make_trials(make_config(), "fedavg", ["seed=1,2"], 0)
    with pytest.raises(ConfigError, match="modules from files"):
        make_trials(make_config(overrides=["--modules", "here"]), "fedfactory", ["sampler.rho=5,7"], None)


def test_settings_that_mean_the_same_are_tried_once() -> None:
    assert len(make_trials(make_config(), "fedavg", ["federated.fedavg_lr=0.1,0.10,1e-1,0.2"], None)) == 2


@pytest.mark.parametrize(
    ("method", "search"),
    [
        ("fedavg", "federated.feddyn_lr=0.01,0.1"),
        ("fedprox", "federated.fedavg_lr=0.01..1"),
        ("feddyn", "federated.server_lr=0.5"),
        ("scaffold", "classifier.learning_rate=0.001..0.1"),
    ],
)
def test_a_search_over_what_the_method_does_not_use_is_refused(method: str, search: str) -> None:
    with pytest.raises(ConfigError, match=f"nothing that {method} does depends on it"):
        make_trials(make_config(), method, [search], None)
