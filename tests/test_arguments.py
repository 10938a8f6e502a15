"""What people type: two lines for a typo, lists in any spelling, a help in plain words."""

from __future__ import annotations

import gc

import pytest

from fedfactory_ray.errors import UsageError
from fedfactory_ray.settings.arguments import help_text, settings_of
from fedfactory_ray.settings.command_line import exit_status, make_config, parse
from fedfactory_ray.settings.config import Config, flatten


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["--presets", "digits"], "--presets: no such option; did you mean --preset?"),
        (["--data.sourc", "x.npz"], "--data.sourc: no such option; did you mean --data.source?"),
        (["--epochs=3"], "--epochs: no such option; did you mean --generator.epochs or --classifier.epochs?"),
        (["--no-data.downlod"], "--no-data.downlod: no such option; did you mean --no-data.download?"),
        (["--zzzzzz"], "--zzzzzz: no such option"),
        (["foo"], "foo: no option, for these begin with --"),
        (["--seed"], "--seed: found nothing, needed one value"),
        (["--seed", "1", "2"], "--seed: found 1 2, needed one value"),
        (["--name", "a\nb"], "--name: found 'a\\nb', needed one line"),
        (["--data.source=a.npz\n"], "--data.source: found 'a.npz\\n', needed one line"),
        (["--data.download", "yes"], "--data.download: found yes, needed no value: --x switches on, --no-x off"),
    ],
)
def test_a_typo_is_told_in_two_lines(typed: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda: print(parse(typed))) == 2
    assert capsys.readouterr().err == f"error: {told}\n--help lists every option.\n"


def test_all_typos_are_told_at_once() -> None:
    with pytest.raises(UsageError) as refusal:
        make_config(overrides=["--sed", "1", "--partition.schem", "iid"])
    assert "did you mean --seed?" in str(refusal.value)
    assert "did you mean --partition.scheme?" in str(refusal.value)


@pytest.mark.parametrize(
    "typed", [["32", "64"], ["32,64"], ["[32,64]"], ["[32, 64]"], ["32", "--generator.patch", "1"]]
)
def test_lists_are_taken_as_people_write_them(typed: list[str]) -> None:
    config = make_config(overrides=["--generator.channels", *typed, "--generator.norm_groups=8"])
    assert config.generator.channels == ((32,) if len(typed) == 3 else (32, 64))


def test_other_values_are_taken_as_people_write_them() -> None:
    config = make_config(
        overrides=[
            *("--partition.scheme", "skew", "--partition.counts", "[1,2]", "[3,4]", "--partition.min_size", "1"),
            *("--generator.noise_mean", "-0.5", "--no-data.download", "--baselines", "none"),
            *("--partition.exclude", "client-001", "client-000/1", "--resources.client.num_gpus", "0.5"),
        ]
    )
    assert config.partition.counts == ((1, 2), (3, 4))
    assert config.partition.exclude == ("client-000/1", "client-001")
    assert (config.generator.noise_mean, config.data.download, config.baselines) == (-0.5, False, ("none",))
    silo = '{"name": "%s", "source": "/%s.npz"}'
    silos = [silo % ("a", "a"), silo % ("b", "b")]
    for told in (silos, [f"[{','.join(silos)}]"]):
        natural = make_config(overrides=["--partition.scheme", "natural", "--partition.silos", *told])
        assert [each.name for each in natural.partition.silos] == ["a", "b"]


def test_the_help_has_every_setting_with_what_one_types() -> None:
    never_stored = {"take_over"}
    assert [name for name in settings_of(Config) if name not in never_stored] == list(flatten(Config().model_dump()))
    text = " ".join(help_text().split())
    for part in (
        "--seed integer",
        "--generator.channels integer,…",
        "--partition.scheme silos|pathological|dirichlet|iid|skew|natural",
        "--data.download | --no-data.download",
        "--resources.client.num_gpus number|auto",
        "--partition.counts [[integer,…],…]",
        "(default: 16,32)",
    ):
        assert part in text
    for part in ("None", "tuple", "str]", "Literal"):
        assert part not in text


def test_a_job_that_ends_searches_for_no_cycles() -> None:
    gc.unfreeze()
    assert exit_status(lambda: None) == 0
    assert gc.get_freeze_count() > 0
    gc.unfreeze()
