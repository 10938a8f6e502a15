"""The command line of every job: defaults, a preset, a YAML file and dotted overrides, the later winning."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import CliApp

from fedfactory_ray.config import Config, merge
from fedfactory_ray.errors import ConfigError
from fedfactory_ray.presets import PRESETS


def make_config(preset: str = "digits", file: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Combine defaults, preset, YAML file and dotted overrides (`["--seed", "1"]`), in that order.

    Raises ConfigError, which lists every problem at once.
    """
    if preset not in PRESETS:
        raise ConfigError([f"preset {preset!r} is unknown: choose one of {', '.join(PRESETS)}"])
    values = PRESETS[preset].values
    if file is not None:
        try:
            loaded = yaml.safe_load(Path(file).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError([f"{file}: {error}"]) from error
        if not isinstance(loaded, dict):
            raise ConfigError([f"{file}: found a {type(loaded).__name__}, needed sections such as `generator:`"])
        values = merge(values, loaded)
    try:
        return CliApp.run(Config, cli_args=list(overrides), **values)
    except ValidationError as error:
        raise ConfigError([_explain(problem) for problem in error.errors()]) from error


def parse(
    arguments: Sequence[str] | None = None, description: str = "", own: Sequence[argparse.ArgumentParser] = ()
) -> tuple[Config, argparse.Namespace]:
    """Parse a job's command line; returns the config and the leading options (`preset`, `config`, `print_config`, and
    those of the job's `own` parsers)."""
    parser = argparse.ArgumentParser(description=description, add_help=False, allow_abbrev=False, parents=list(own))
    lines = "\n".join(f"  {name:16} {preset.description}" for name, preset in PRESETS.items())
    parser.add_argument("--preset", default="digits", help="starting point, see the list below")
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the settings below")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("-h", "--help", action="store_true", help="show this help and stop")
    options, overrides = parser.parse_known_args(arguments)
    if options.help:
        print(f"{parser.format_help()}\npresets:\n{lines}\n\nEvery setting, with its default (preset `digits`):\n")
        CliApp.run(Config, cli_args=["--help"])
    return make_config(options.preset, options.config, overrides), options


def _explain(problem: Any) -> str:
    """One line for one pydantic error: the dotted name, what was found and what was needed."""
    name = ".".join(str(part) for part in problem["loc"]) or "config"
    if problem["type"] == "extra_forbidden":
        return f"{name}: unknown setting (--help lists them all)"
    message = problem["msg"].removeprefix("Value error, ")
    found = problem["input"]
    return f"{name}: {message}" + ("" if isinstance(found, dict | BaseModel) else f" (found {found!r})")
