"""Relative paths start where the command was typed, whoever opens them; a run's name does not tell where that was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from conftest import write_npz

from fedfactory_ray.errors import DataMissingError
from fedfactory_ray.pipeline.session import run_name
from fedfactory_ray.pipeline.survey import survey, survey_here
from fedfactory_ray.settings.command_line import SUBMITTED, make_config, parse, stored_config
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.files import Storage

SILOS = [{"name": "a", "source": "a.npz"}, {"name": "b", "source": "/there/b.npz"}]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_paths_are_made_absolute_where_the_command_was_typed(here: Path) -> None:
    (here / "mine.yaml").write_text(yaml.safe_dump({"partition": {"scheme": "natural", "silos": SILOS}}))
    typed = ["--data.source", "my data.npz", "--data.root", "files", "--modules=exchange"]
    config = make_config(file="mine.yaml", overrides=typed)
    assert config.data.source == f"{here}/my data.npz"
    assert config.data.root == f"{here}/files"
    assert config.modules == f"{here}/exchange"
    assert [silo.source for silo in config.partition.silos] == [f"{here}/a.npz", "/there/b.npz"]


@pytest.mark.parametrize("source", ["digits", "cifar10", "medmnist:bloodmnist", "~/a.npz", "/a.npz", "file:///a.npz"])
def test_names_of_data_sets_addresses_and_homes_stay(source: str) -> None:
    config = make_config(overrides=["--data.source", source, "--data.root", "~/x", "--modules", "s3://bucket/exchange"])
    assert (config.data.source, config.data.root, config.modules) == (source, "~/x", "s3://bucket/exchange")
    assert config.folder is None


@pytest.mark.parametrize("source", ["my.npz", "./my.npz", "../my.npz", "/somewhere/my.npz"])
def test_a_run_keeps_the_name_and_settings_of_what_was_typed(source: str, here: Path) -> None:
    values: dict[str, Any] = {"data": {"source": source}, "partition": {"scheme": "natural", "silos": SILOS}}
    typed = Config.model_validate(values)
    (here / "mine.yaml").write_text(yaml.safe_dump(values))
    config = make_config(file="mine.yaml")
    assert config.determining() == typed.determining()
    assert run_name(config) == run_name(typed)
    assert run_name(make_config(overrides=["--modules", "x"])) == run_name(Config(modules="x"))


def test_a_stored_run_is_that_of_the_folder_it_was_made_in(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(overrides=["--data.source", "my.npz"])
    Storage(str(here / "runs")).write_json("old/settings.json", config.model_dump(mode="json"))
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    found = stored_config("old", ["--storage.uri", "../runs", "--data.root", "files"])
    assert (found.data.source, found.data.root) == (f"{here}/my.npz", f"{here}/elsewhere/files")
    assert found.determining() == config.determining()


def test_a_worker_opens_the_file_in_the_folder_of_the_command(
    cluster: None, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file of that name lies in the workers' folder."""
    workers = Path(ray.get(ray.remote(num_cpus=0)(lambda: str(Path.cwd())).remote()))
    name = f"{here.name}.npz"
    write_npz(here / name, classes=3, n=12)
    other = write_npz(workers / name, classes=2, n=12) if workers != here else None
    try:
        info, _, _ = survey(make_config(overrides=["--data.source", name]))
    finally:
        if other is not None:
            other.unlink()
    assert info.classes == 3


def test_a_submitted_job_tells_where_its_folder_is(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(SUBMITTED, "{}")
    parse(["--data.source", "my.npz"])
    assert f"relative paths start in {here}" in capsys.readouterr().out
    parse(["--data.source", "/my.npz"])
    assert "relative" not in capsys.readouterr().out


def test_a_submitted_job_tells_that_its_folder_does_not_last(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    parse([])
    assert "note" not in capsys.readouterr().out, "a person's own folder does"
    monkeypatch.setenv(SUBMITTED, "{}")
    parse([])
    told = capsys.readouterr().out
    assert f"runs will lie in {here}" in told
    assert "give --storage.uri" in told
    assert "MLflow's store will lie in" in told
    parse(["--storage.uri", "/shared/runs", "--tracking.uri", "http://mlflow:5000"])
    assert "note" not in capsys.readouterr().out


def test_a_file_that_was_not_uploaded_is_told_why(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests of this process may be on a cluster
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(here))
    config = make_config(overrides=["--data.source", "my.npz"])
    with pytest.raises(DataMissingError, match=r"my\.npz"):
        survey_here(config)
    monkeypatch.setenv(SUBMITTED, "{}")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(DataMissingError, match=r"uploaded without what \.gitignore and \.rayignore name"):
        survey_here(config)
    assert survey_here(make_config(overrides=["--data.source", "/shared/my.npz"])) is None, "its nodes may have it"
