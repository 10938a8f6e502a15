"""The command line of every job: defaults, a preset, a YAML file and dotted overrides, the later winning."""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import CliApp
from rich.console import Console
from rich.text import Text

from fedfactory_ray.errors import ConfigError, FedFactoryError
from fedfactory_ray.settings.arguments import checked, help_text
from fedfactory_ray.settings.config import Config, merge, nested, upgraded
from fedfactory_ray.settings.names import is_folder_name
from fedfactory_ray.settings.paths import SUBMITTED, is_relative, located
from fedfactory_ray.settings.presets import PRESETS
from fedfactory_ray.storage.layout import SETTINGS

LARGEST_FILE, DEEPEST, MOST_VALUES = 2**20, 10, 10_000
"""Bytes of a YAML file, its sections inside one another, and its sections and lists of one depth, at most."""
LOG_WIDTH = 160
"""Columns of a log, unless $COLUMNS tells; rich would fold tables to 80."""


def make_config(
    preset: str = "digits", file: str | None = None, overrides: Sequence[str] = (), others: Sequence[str] = ()
) -> Config:
    """Combine defaults, preset, YAML file and dotted overrides (`["--seed", "1"]`), in that order. Relative paths, the
    file's too, start in this process's folder, where the command was typed.

    Raises ConfigError, which lists every problem at once; and UsageError for what is no setting, where one of the
    `others`, a job's own options, may be meant.
    """
    if preset not in PRESETS:
        raise ConfigError([f"preset {preset!r} is unknown: choose one of {', '.join(PRESETS)}"])
    values = PRESETS[preset].values
    if file is not None:
        values = merge(values, upgraded(read_yaml(file)))
    return _combine(values, overrides, others)


class OnceLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """See SafeLoader."""
        seen = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"found {key.value!r:.80} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(file: str) -> dict[str, Any]:
    """The settings of a YAML file. Raises ConfigError for what is none, or so large or deep that nobody typed it."""
    try:
        if Path(file).exists() and not Path(file).is_file():
            raise ConfigError([f"{file}: found no file, needed one with sections such as `generator:`"])
        if Path(file).stat().st_size > LARGEST_FILE:
            raise ConfigError([f"{file}: found {Path(file).stat().st_size} bytes, needed {LARGEST_FILE} at most"])
        loaded = yaml.load(Path(file).read_text(), OnceLoader) or {}
    except RecursionError as error:
        raise ConfigError([f"{file}: found lists within lists, so deep; needed {DEEPEST} at most"]) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError([f"{file}: {error}"[:1000]]) from error
    if not isinstance(loaded, dict):
        raise ConfigError([f"{file}: found a {type(loaded).__name__}, needed sections such as `generator:`"])
    level: list[Any] = [loaded]
    for _ in range(DEEPEST):
        strange = [key for value in level if isinstance(value, dict) for key in value if not isinstance(key, str)]
        if strange:
            raise ConfigError([f"{file}: found the key {strange[0]!r:.80}, needed names of settings"])
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        # Aliases make much of little: no more is looked at than anybody types.
        level = list(islice((v for values in inner for v in values if isinstance(v, dict | list)), MOST_VALUES + 1))
        if len(level) > MOST_VALUES:
            raise ConfigError([f"{file}: found more than {MOST_VALUES} lists and sections, needed fewer"])
        if not level:
            return loaded
    raise ConfigError([f"{file}: found sections {DEEPEST} deep, needed fewer"])


def _combine(values: dict[str, Any], overrides: Sequence[str], others: Sequence[str] = ()) -> Config:
    arguments = checked(overrides, others)
    with _explained():
        return located(CliApp.run(Config, cli_args=arguments, **values))


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """`config` with `changes`, values by dotted field. Raises ConfigError."""
    with _explained():
        return located(Config.model_validate(merge(config.model_dump(), nested(changes))))


def stored_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """The config of the run `name`, as its last start left it in storage, with dotted overrides.

    Where it lies is told by the overrides (`--storage.uri`), not by what is stored. Raises ConfigError.
    """
    from fedfactory_ray.storage.files import Storage

    if not is_folder_name(name):
        raise ConfigError([f"name: found {name!r}, needed the name of a run, which is a folder of storage.uri"])
    uri = make_config(overrides=overrides).storage.uri
    storage = Storage(uri).within(name)
    if not storage.exists(SETTINGS):
        raise ConfigError([f"{storage.uri} holds no run: {SETTINGS} is missing; --storage.uri tells where runs lie"])
    stored = storage.read_json(SETTINGS)
    if not isinstance(stored, dict):
        raise ConfigError([f"{storage.uri}/{SETTINGS}: found a {type(stored).__name__}, needed a run's settings"])
    values = merge(upgraded(stored), {"name": None, "storage": {"uri": uri}})
    # Runs were once given names by characters that no new one may have.
    return _combine(values, overrides).model_copy(update={"name": name})


def parse(
    arguments: Sequence[str] | None = None,
    description: str = "",
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> tuple[Config, argparse.Namespace]:
    """Parse a job's command line; returns the config and the other options (`preset`, `config`, the job's own).

    `--help` and `--print-config` print and end the process. Raises ConfigError.
    """
    parser = argparse.ArgumentParser(
        description=description,
        add_help=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--preset", default="digits", help="starting point, see the list below")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with any of the settings below; relative paths in it start where the command is typed",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("-h", "--help", action=_Help, help="show this help and stop")
    options, overrides = parser.parse_known_args(arguments)
    own = [option for action in parser._actions for option in action.option_strings]
    config = make_config(options.preset, options.config, overrides, own)
    if options.print_config:
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
        raise SystemExit(0)
    if not PRESETS[options.preset].verified:
        print(f"note: preset {options.preset} has not been run on its hardware yet")
    for note in _notes_on_submission(config) if SUBMITTED in os.environ else ():
        print(f"note: {note}")
    return config, options


def _notes_on_submission(config: Config) -> Iterator[str]:
    """What a person who submits a job to a cluster may not expect: the job works in a copy of their folder."""
    if config.folder is not None:
        yield f"relative paths start in {config.folder}, this job's copy of its working directory"
    lasting = {}
    if is_relative(config.storage.uri):
        lasting["runs"] = "--storage.uri with a shared folder or s3://…"
    if not (config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")):
        lasting["MLflow's store"] = "--tracking.uri with a server's address"
    for what, mend in lasting.items():
        yield f"{what} will lie in {os.getcwd()}, which goes with the cluster and changes with each edit: give {mend}"


def job_console() -> Console:
    """Where a job prints, texts as they are: `[x]` in people's names is no markup. Wide enough for its tables where
    that is no terminal, such as in a submitted job's log."""
    console = Console(markup=False, emoji=False)
    if not console.file.isatty() and "COLUMNS" not in os.environ:
        console.width = LOG_WIDTH
    return console


def exit_status(job: Callable[[], None]) -> int:
    """Run a job, the last that its process does; returns its exit status: 0, or 2 for a refusal and 130 for Ctrl-C,
    told without a traceback."""
    try:
        job()
    except FedFactoryError as error:
        print_refusal(error)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped. The same command goes on from here.")
        return 130
    finally:
        # Else the interpreter, as it ends, looks for cycles among the millions of objects of torch and MLflow: seconds.
        gc.freeze()
    return 0


def print_refusal(error: FedFactoryError) -> None:
    """Tell a refusal where errors go."""
    Console(stderr=True).print(Text.assemble(("error:", "red"), f" {error}"), soft_wrap=True)


class _Help(argparse.Action):
    """Help on the job, the presets and every setting."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        lines = "\n".join(f"  {name:22} {preset.description}" for name, preset in PRESETS.items())
        print(f"{parser.format_help()}\npresets:\n{lines}\n\nEvery setting, with its default (preset `digits`):\n")
        print(help_text())
        parser.exit()


@contextmanager
def _explained() -> Iterator[None]:
    """Raise a ConfigError with every problem of a configuration that does not validate."""
    try:
        yield
    except ValidationError as error:
        raise ConfigError([_explain(problem) for problem in error.errors()]) from error


def _explain(problem: Any) -> str:
    """One line for one pydantic error: the dotted name, what was found and what was needed."""
    name = ".".join(str(part) for part in problem["loc"]) or "config"
    if problem["type"] == "extra_forbidden":
        return f"{name}: unknown setting (--help lists them all)"
    message = problem["msg"].removeprefix("Value error, ")
    found = problem["input"]
    return f"{name}: {message}" + ("" if isinstance(found, dict | BaseModel) else f" (found {found!r})")
