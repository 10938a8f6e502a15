import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from fedfactory_ray.errors import ConfigError
from fedfactory_ray.settings.command_line import make_config
from fedfactory_ray.settings.config import Config, flatten
from fedfactory_ray.settings.presets import PRESETS

RUN = Path(__file__).parents[1] / "jobs" / "run.py"


def test_preset_file_and_overrides_combine_in_this_order(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("generator:\n  batch_size: 16\n  learning_rate: 0.5\nseed: 3\n")
    config = make_config("bloodmnist-cpu", str(file), ["--generator.learning_rate", "0.25", "--partition.alpha=2"])
    assert config.data.source == "medmnist:bloodmnist"  # from the preset
    assert (config.generator.batch_size, config.seed) == (16, 3)  # from the file
    assert (config.generator.learning_rate, config.partition.alpha) == (0.25, 2.0)  # from the command line


def test_a_config_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().generator.batch_size = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--generator.epochs", "many"], "generator.epochs: .*number.*found 'many'"),
        (["--generator.channels", "12,20"], "channels .* multiple of norm_groups"),
        (["--data.source", "medmnist:chestmnist"], "needed medmnist:<flag> with a flag of"),
        (["--data.resolution", "9"], "resolution 9 .* needs a multiple of 2"),
        (["--synthesis.unit_size", "300"], "unit_size=300 needs to be a multiple of batch_size"),
        (["--partition.scheme", "skew"], "`counts` goes with `skew`"),
        (["--classifier.batch_size", "63", "--resources.classifier_workers", "2"], "multiple of resources.classifier"),
        (["--name", "../elsewhere"], "name"),
    ],
)
def test_impossible_settings_are_refused_with_the_reason(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        make_config(overrides=overrides)


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("generatr: {}\ngenerator: {epochs: -1, depth: 3}\n")
    with pytest.raises(ConfigError) as refusal:
        make_config(file=str(file))
    for part in ("generatr: unknown setting", "generator.depth: unknown setting", "generator.epochs", "found -1"):
        assert part in str(refusal.value)


def test_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose one of digits"):
        make_config("digts")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_survive_yaml(preset: str, tmp_path: Path) -> None:
    config = make_config(preset)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert make_config("digits", str(file)) == config


def test_results_do_not_depend_on_where_a_run_is_kept() -> None:
    here, there = Config(), make_config(overrides=["--storage.uri", "s3://bucket", "--resources.client.num_cpus", "4"])
    assert here.determining() == there.determining()
    assert here.determining() != make_config(overrides=["--seed", "1"]).determining()


def test_a_run_keeps_its_name_and_folder_when_an_architecture_is_added() -> None:
    more = make_config(overrides=["--architecture", "both", "--experts.real_share", "0.5", "--baselines", "[]"])
    assert Config().determining() == more.determining()
    assert (Config().main_method, more.main_method) == ("fedfactory", "fedfactory")
    assert make_config(overrides=["--architecture", "decentralised"]).main_method == "product"


def run_job(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(RUN), *arguments], capture_output=True, text=True, timeout=120)


def test_help_explains_every_setting() -> None:
    text = run_job("--help").stdout
    missing = [name for name in flatten(Config().model_dump()) if f"--{name}" not in text]
    assert not missing
    assert "Concentration of `dirichlet`" in text.replace("\n", " ")
    assert all(name in text for name in PRESETS)


def test_print_config_shows_the_resolved_tree() -> None:
    result = run_job("--preset", "cifar10-published", "--print-config", "--seed", "7")
    assert result.returncode == 0
    tree = yaml.safe_load(result.stdout)
    assert (tree["seed"], tree["data"]["source"], tree["classifier"]["model"]) == (7, "cifar10", "resnet50")


def test_unknown_option_is_refused_before_anything_starts() -> None:
    result = run_job("--generator.depth", "3")
    assert result.returncode == 2
    assert "generator.depth" in result.stderr
    assert "Traceback" not in result.stderr


SILOS = [{"name": "a", "source": "a.npz"}, {"name": "b", "source": "b.npz"}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"partition": {"scheme": "natural"}}, "`silos` goes with `natural`"),
        ({"partition": {"silos": SILOS}}, "`silos` goes with `natural`"),
        ({"partition": {"scheme": "natural", "silos": SILOS + SILOS[:1]}}, "a name of its own"),
        ({"partition": {"scheme": "natural", "silos": [{"name": "../a", "source": "a.npz"}]}}, "match pattern"),
        ({"partition": {"scheme": "natural", "silos": SILOS}, "baselines": ["centralised"]}, "in one place"),
        ({"modules": "exchange", "baselines": ["centralised"]}, "in one place"),
    ],
)
def test_silos_that_are_apart_stay_apart(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(values)


def test_references_are_those_that_the_data_allow() -> None:
    natural = Config.model_validate({"partition": {"scheme": "natural", "silos": SILOS}})
    assert Config().references == ("centralised",)
    assert make_config(overrides=["--baselines", "none"]).references == ()
    assert natural.references == Config(modules="exchange").references == ()
    agreed = natural.with_class_names(["x", "y"])
    assert agreed.data_of("b") == agreed.data.model_copy(update={"source": "b.npz"})


def test_where_a_silo_lies_does_not_determine_the_results() -> None:
    here, there = (
        Config.model_validate({"partition": {"scheme": "natural", "silos": [SILOS[0] | place]}})
        for place in ({}, {"labels": {"site": "x"}, "resources": {"y": 1}})
    )
    assert here.determining() == there.determining()


def test_settings_that_moved_are_taken_by_their_old_names_too(tmp_path: Path) -> None:
    old = ["--classifier.checkpoint_every", "7", "--federated.checkpoint_every=3"]
    config = make_config(overrides=old)
    assert (config.storage.checkpoint_epochs, config.storage.checkpoint_rounds) == (7, 3)
    (tmp_path / "old.yaml").write_text("classifier: {in_memory_mb: 9, epochs: 2}\n")
    config = make_config(file=str(tmp_path / "old.yaml"))
    assert (config.resources.in_memory_mb, config.classifier.epochs) == (9, 2)
    # They say where a run happens, so they do not make it another run.
    assert config.determining() == make_config(overrides=["--classifier.epochs", "2"]).determining()


def test_real_images_are_shown_only_where_one_place_holds_them_all_or_by_order() -> None:
    silos = [{"name": "north", "source": "a.npz"}]
    natural = {"data": {"source": "t.npz"}, "partition": {"scheme": "natural", "silos": silos}}
    assert Config().shows_real
    assert not Config.model_validate(natural).shows_real
    assert not Config.model_validate({"modules": "exchange"}).shows_real
    assert Config.model_validate(natural | {"tracking": {"real_images": "shown"}}).shows_real
    assert not Config.model_validate({"tracking": {"real_images": "hidden"}}).shows_real


def test_scratch_is_a_folder_of_the_node() -> None:
    for wrong in ("s3://bucket/scratch", "scratch", ""):
        with pytest.raises(ValueError, match="scratch"):
            Config.model_validate({"storage": {"scratch": wrong}})
    assert Config().determining() == Config.model_validate({"storage": {"scratch": "/mnt/scratch"}}).determining()
