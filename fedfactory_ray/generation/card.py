"""A module's card: its provenance as JSON, beside the weights (safetensors) that a client uploads for one class."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModuleCard:
    """Provenance of a module: everything about it but its weights."""

    client: str
    label: int
    images: int
    channels: int
    resolution: int
    steps: int
    precision: str
    generator: dict[str, Any]
    sha256: str
    size: int

    @property
    def key(self) -> tuple[str, int]:
        """Client and class."""
        return self.client, self.label

    @property
    def folder(self) -> str:
        """Where the module lies in a run's storage."""
        return f"modules/{self.client}/class-{self.label:03d}"

    def same_network(self, other: ModuleCard) -> bool:
        """Whether one network can hold the weights of both."""
        return all(getattr(self, f) == getattr(other, f) for f in ("generator", "channels", "resolution"))

    @property
    def upload_bytes(self) -> int:
        """Bytes on the wire: weights and card."""
        return self.size + len(self.to_json())

    def to_json(self) -> bytes:
        """The card as JSON."""
        return json.dumps(asdict(self), indent=2, sort_keys=True).encode()

    @classmethod
    def from_json(cls, text: bytes) -> ModuleCard:
        """Inverse of `to_json`."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class ModuleHandle:
    """A module by its card; the weights lie in the object store (`ref`) and in storage, never here."""

    card: ModuleCard
    ref: Any = field(default=None, compare=False)


Modules = dict[tuple[str, int], "ModuleHandle"]
