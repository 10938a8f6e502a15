"""What a study tries: fields of the configuration with their choices or ranges, and the settings drawn from them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from fedfactory_ray.errors import ConfigError
from fedfactory_ray.seeds import random_state
from fedfactory_ray.settings.command_line import changed
from fedfactory_ray.settings.config import Config, flatten

TRIALS = 8
"""Settings that are drawn where a field has a range and no number is given."""
ATTEMPTS = 100
"""Draws for each wanted setting before a search counts as exhausted (whole numbers and choices repeat)."""
SEPARATOR = re.compile(r",(?![^\[]*\])")

Settings = Mapping[str, str]
"""Values by dotted field, as one would type them."""


@dataclass(frozen=True)
class Dimension:
    """A field that is searched: its choices, or else the ends of its range."""

    field: str
    choices: tuple[str, ...]
    low: float = 0.0
    high: float = 0.0
    whole: bool = False

    @property
    def logarithmic(self) -> bool:
        """Whether the range is drawn from uniformly in the logarithm: where it spans a factor of 10 or more."""
        return self.low > 0 and self.high / self.low >= 10

    @property
    def ends(self) -> tuple[str, str]:
        """The ends of the range, as one would type them."""
        return f"{self.low:.15g}", f"{self.high:.15g}"

    def draw(self, state: np.random.RandomState) -> str:
        """A value, as one would type it: three significant digits, or a whole number."""
        if self.choices:
            return self.choices[state.randint(len(self.choices))]
        share = state.rand()
        value = self.low + (self.high - self.low) * share
        if self.logarithmic:
            value = self.low * (self.high / self.low) ** share
        value = round(value) if self.whole else float(f"{value:.3g}")
        return f"{min(max(value, self.low), self.high):.15g}"


def parse_search(texts: Sequence[str], config: Config, sections: Sequence[str]) -> list[Dimension]:
    """The dimensions that `texts` ask for: `field=a,b,c` (choices; a list in brackets is one) or `field=low..high`.

    Every choice, and both ends of a range, are tried on `config`. Raises ConfigError with every problem at once.
    """
    dimensions: list[Dimension] = []
    problems: list[str] = []
    known = [name for name in flatten(config.model_dump()) if name.partition(".")[0] in sections]
    for text in texts:
        name, _, values = text.partition("=")
        if name not in known:
            fields = ", ".join(sections)
            problems.append(f"--search {text}: found {name!r}, needed a setting (see --help) of {fields}")
        elif name in [dimension.field for dimension in dimensions]:
            problems.append(f"--search {text}: {name} is searched twice; give all its values at once")
        else:
            try:
                dimensions.append(_parse(name, values, config))
            except ConfigError as error:
                problems += [f"--search {text}: {problem}" for problem in error.problems]
    if not texts:
        problems.append("--search: found none, needed at least one, such as --search federated.fedavg_lr=0.01,0.03,0.1")
    if problems:
        raise ConfigError(problems)
    return dimensions


def _parse(name: str, text: str, config: Config) -> Dimension:
    ends = text.split("..")
    if len(ends) == 2 and all(map(_is_number, ends)):
        low, high = map(float, ends)
        if not low < high:
            raise ConfigError([f"found a range from {low:g} to {high:g}, needed low..high"])
        kinds = {type(value_of(configured(config, {name: end}), name)) for end in ends}
        if not kinds <= {int, float}:
            raise ConfigError([f"found a range, needed choices: {name} is no number"])
        return Dimension(name, (), low, high, whole=kinds == {int})
    choices = tuple(choice.strip() for choice in SEPARATOR.split(text))
    if not all(choices):
        raise ConfigError(["found an empty value, needed field=a,b,c or field=low..high"])
    for choice in choices:
        configured(config, {name: choice})
    return Dimension(name, choices)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def configured(config: Config, settings: Settings) -> Config:
    """`config` with `settings`, whose values are read as YAML. Raises ConfigError."""
    try:
        values = {name: yaml.safe_load(value) for name, value in settings.items()}
    except yaml.YAMLError as error:
        raise ConfigError([f"found {dict(settings)}: {error}"]) from error
    return changed(config, values)


def overrides(settings: Settings) -> str:
    """The arguments of a job's command line that make these settings; `null` is the default and needs none."""
    flags = {"true": "--{0}", "false": "--no-{0}", "null": ""}
    return " ".join(filter(None, (flags.get(v, "--{0} {1}").format(k, v) for k, v in settings.items())))


def value_of(config: Config, name: str) -> Any:
    """The value of a dotted field."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def draw_settings(dimensions: Sequence[Dimension], trials: int | None, seed: int) -> list[Settings]:
    """The settings to try: of choices alone the whole grid, or else `trials` different ones drawn by `seed`.

    More trials add settings behind those of fewer, and each dimension is drawn from for itself.
    """
    names = [dimension.field for dimension in dimensions]
    if all(dimension.choices for dimension in dimensions):
        grid = list(itertools.product(*(dimension.choices for dimension in dimensions)))
        if trials is None or trials >= len(grid):
            return [dict(zip(names, values, strict=True)) for values in grid]
    wanted = trials or TRIALS
    drawn: dict[tuple[str, ...], None] = {}
    for attempt in range(wanted * ATTEMPTS):
        drawn[tuple(d.draw(random_state(seed, "tune", d.field, attempt)) for d in dimensions)] = None
        if len(drawn) == wanted:
            break
    return [dict(zip(names, values, strict=True)) for values in drawn]
