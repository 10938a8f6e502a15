"""Actors of this process: what Ray would run elsewhere is called at once; references are Ray's own."""

from __future__ import annotations

from typing import Any

import ray


class Method:
    """A method of an actor that lives here."""

    def __init__(self, function: Any, num_returns: int = 1) -> None:
        self.function, self.num_returns = function, num_returns

    def options(self, num_returns: int) -> Method:
        return Method(self.function, num_returns)

    def remote(self, *arguments: Any) -> Any:
        result = self.function(*(ray.get(a) if isinstance(a, ray.ObjectRef) else a for a in arguments))
        return ray.put(result) if self.num_returns == 1 else [ray.put(each) for each in result]


class Actor:
    """An actor that lives here."""

    def __init__(self, instance: Any) -> None:
        self.instance = instance

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self.instance, name))


class Starts:
    """Takes the place of `cluster.plan.start_actor`, and notes the options that were given."""

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []

    def __call__(self, kind: type, *arguments: Any, **options: Any) -> Actor:
        self.options.append(options)
        return Actor(kind(*arguments))
