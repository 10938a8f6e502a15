"""Starting actors: the one place where a plain class becomes an actor of Ray."""

from __future__ import annotations

from typing import Any

import ray


def start_actor(kind: type, *arguments: Any, **options: Any) -> Any:
    """An actor of `kind`, made there with `arguments`; `options` are Ray's."""
    return ray.remote(kind).options(**options).remote(*arguments)
