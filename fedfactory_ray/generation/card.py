"""A module's card: its provenance, beside the weights (safetensors) that a client uploads for one class."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Field

from fedfactory_ray.errors import CardError
from fedfactory_ray.settings.data import NAME
from fedfactory_ray.settings.sections import GeneratorConfig
from fedfactory_ray.storage.artefact import Artefact, fingerprint
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import MODULE_CARD, MODULES, module_folder

LARGEST_CARD, LARGEST_MODULE = 2**16, 2**30
"""Bytes of a card and of its weights, at most; the published module has 0.1 GiB."""
Whole = Annotated[int, Field(strict=True, ge=0, le=LARGEST_MODULE)]


@dataclass(frozen=True)
class InModulesPlace(Artefact):
    """What lies in the folder of a client's module of a class, of which the client holds `n_images`."""

    client: Annotated[str, Field(pattern=NAME)]
    label: Whole
    n_images: Whole

    @property
    def key(self) -> tuple[str, int]:
        """Client and class."""
        return self.client, self.label

    @property
    def folder(self) -> str:
        """See Artefact."""
        return module_folder(self.client, self.label)


@dataclass(frozen=True)
class ModuleCard(InModulesPlace):
    """Provenance of a module: everything about it but its weights. `n_images` of its class trained it in `precision`;
    the weights are of `size` bytes.

    `canary` is that of the processes that trained it (see generation.canary), and those of all where several did after
    one another; empty where an earlier version did. It determines nothing: a module made elsewhere is found.
    `class_name` is what its client calls the class, so that no module is used as another class's; empty where an
    earlier version made it.
    """

    kind: ClassVar[str] = "module"
    renamed: ClassVar[dict[str, str]] = {"images": "n_images"}
    channels: Annotated[Whole, Field(ge=1, le=4)]
    resolution: Annotated[Whole, Field(ge=1, le=4096)]
    steps: Whole
    precision: Annotated[str, Field(pattern=r"^(fp32|bf16|fp16)$")]
    generator: dict[str, Any]
    size: Annotated[Whole, Field(le=LARGEST_MODULE)]
    canary: Annotated[str, Field(pattern=r"^[0-9a-f+]{0,8192}$")] = ""
    class_name: Annotated[str, Field(max_length=256)] = ""

    @classmethod
    def from_json(cls, text: bytes) -> ModuleCard:
        """See Artefact; it may come from anybody, so nothing enormous is parsed."""
        if len(text) > LARGEST_CARD:
            raise CardError(cls.kind, f"{len(text)} bytes, at most {LARGEST_CARD} are a card")
        return super().from_json(text)

    def same_network(self, other: ModuleCard) -> bool:
        """Whether one network can hold the weights of both."""
        return all(getattr(self, f) == getattr(other, f) for f in ("generator", "channels", "resolution"))

    @property
    def upload_bytes(self) -> int:
        """Bytes on the wire: weights and card."""
        return self.size + len(self.to_json())


def read_cards(storage: Storage) -> list[ModuleCard]:
    """The cards of all modules in a run's storage, by client and class. Raises CardError."""
    places = [posixpath.dirname(name) for name in storage.names(MODULES) if MODULE_CARD.fullmatch(name)]
    cards = [ModuleCard.read(storage, place) for place in places]
    return sorted(cards, key=lambda card: card.key)


def module_fingerprint(
    generator: GeneratorConfig, *, precision: str, threads: int, seed: int, images_sha256: str
) -> str:
    """What determines a module: settings, the arithmetic that `generator.precision` comes to where it is trained, torch
    threads, its seed, and its images, which stand for their indices too."""
    apart = ("precision", "min_images")  # the one is told by what it comes to, the other changes no module
    settings = {name: value for name, value in generator.determining().items() if name not in apart}
    if generator.prediction == "gaussian" and generator.augment != "none":
        settings["filter"] = "turned"  # earlier versions left it upright before turned images
    return fingerprint(ModuleCard.kind, settings, precision, threads, seed, images_sha256)


@dataclass(frozen=True)
class ModuleHandle:
    """A module by its card; the weights lie in the object store (`ref`, a Ray reference) and in storage, never here."""

    card: ModuleCard
    ref: Any = field(default=None, compare=False)


Modules = dict[tuple[str, int], ModuleHandle]
"""Modules by client and class."""
