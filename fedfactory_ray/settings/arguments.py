"""Arguments that name settings, `--section.field value …`, and the help on them."""

from __future__ import annotations

import difflib
import shutil
import textwrap
import types
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedfactory_ray.errors import UsageError
from fedfactory_ray.settings.config import MOVED, Config

WORDS = {int: "integer", float: "number", str: "text"}


def settings_of(kind: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every setting below `kind`, by dotted name."""
    found: dict[str, FieldInfo] = {}
    for name, field in kind.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            found |= settings_of(section, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = field
    return found


def checked(arguments: Sequence[str], others: Iterable[str] = ()) -> list[str]:
    """`arguments` as `--name=value` by today's names, a list's values by commas, and switches.

    Raises UsageError for what is no option, with one of the settings' or of the `others` that may be meant.
    """
    known = settings_of(Config)
    switches = {f"--{no}{name}" for name, field in known.items() if field.annotation is bool for no in ("", "no-")}
    options = {f"--{name}": field for name, field in known.items() if field.annotation is not bool}
    moved = {f"--{old}": f"--{new}" for old, new in MOVED.items()}
    taken: list[str] = []
    problems: list[str] = []
    for typed, values in _by_flag(arguments):
        flag = moved.get(typed, typed)
        if flag not in options and flag not in switches:
            underlined = f"--{flag.removeprefix('--').replace('-', '_')}".replace("--no_", "--no-", 1)
            flag = underlined if underlined in (*options, *switches) else flag
        if any(len(value.splitlines()) > 1 or value != value.rstrip("\r\n") for value in values):
            # Of which pydantic-settings would take the first line alone.
            problems.append(f"{typed}: found {' '.join(values)!r:.100}, needed one line")
        elif flag in options and len(values) == 1:
            taken.append(f"{flag}={values[0]}")
        elif flag in options and values and get_origin(options[flag].annotation) is tuple:
            joined = ",".join(values)
            taken.append(f"{flag}=[{joined}]" if joined[0] in "[{" else f"{flag}={joined}")
        elif flag in options:
            problems.append(f"{typed}: found {' '.join(values) or 'nothing'}, needed one value")
        elif flag in switches and not values:
            taken.append(flag)
        elif flag in switches:
            problems.append(f"{typed}: found {' '.join(values)}, needed no value: --x switches on, --no-x off")
        elif flag:
            problems.append(f"{typed}: no such option{_meant(flag, [*options, *switches, *others])}")
        else:
            problems.append(f"{' '.join(values)}: no option, for these begin with --")
    if problems:
        raise UsageError(problems)
    return taken


def _by_flag(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag with the values behind it; values before any flag have the empty one."""
    found: list[tuple[str, list[str]]] = []
    for argument in arguments:
        flag, mark, value = argument.partition("=")
        if argument.startswith("--"):
            found.append((flag, [value] if mark else []))
        elif found:
            found[-1][1].append(argument)
        else:
            found.append(("", [argument]))
    return found


def _meant(flag: str, options: Sequence[str]) -> str:
    """The options that `flag` is close to, or the last part of."""
    same = [option for option in options if option.rpartition(".")[2] == flag.removeprefix("--")]
    close = same[:3] or difflib.get_close_matches(flag, options, 1)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def help_text() -> str:
    """Every setting, with its default and values as one types them."""
    width = min(shutil.get_terminal_size().columns, 120)
    blocks = []
    for section, names in groupby(settings_of(Config).items(), lambda item: item[0].rpartition(".")[0]):
        lines = [f"{section}:"] if section else []
        for name, field in names:
            switch = field.annotation is bool
            lines.append(f"  --{name} | --no-{name}" if switch else f"  --{name} {_written(field.annotation)}")
            lines.append(textwrap.fill(_told(field), width, initial_indent=" " * 8, subsequent_indent=" " * 8))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _told(field: FieldInfo) -> str:
    """A setting's description, with its default unless it tells that itself."""
    text, default = field.description or "", field.get_default(call_default_factory=True)
    if default is None or "default:" in text.lower():
        return text
    if isinstance(default, tuple):
        return f"{text} (default: {','.join(map(str, default)) or 'none'})"
    return f"{text} (default: {('off', 'on')[default] if isinstance(default, bool) else default})"


def _written(kind: Any) -> str:
    """A type by what one types."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _written(inner[0])
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return "|".join(_written(part) for part in inner if part is not type(None))
    if origin is tuple and get_origin(inner[0]) is tuple:
        return f"[[{_written(get_args(inner[0])[0])},…],…]"
    if origin is tuple and isinstance(inner[0], type) and issubclass(inner[0], BaseModel):
        return "[{" + ", ".join(f'"{name}": …' for name in inner[0].model_fields) + "},…]"
    if origin is tuple:
        return f"{_written(inner[0])},…"
    return WORDS.get(kind, str(kind))
