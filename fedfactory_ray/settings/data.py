"""The sections that tell where images come from, and how they are dealt to clients."""

from __future__ import annotations

import os
from typing import Annotated, Literal
from unicodedata import normalize

from pydantic import Field, field_validator, model_validator

from fedfactory_ray.settings.medmnist import medmnist_info
from fedfactory_ray.settings.sections import Section

NATIVE_RESOLUTION = {"digits": 8, "cifar10": 32}


def is_named(source: str) -> bool:
    """Whether a source is a data set's name (`digits`, `medmnist:bloodmnist`) and no path."""
    return source in NATIVE_RESOLUTION or source.startswith("medmnist:")


class DataConfig(Section):
    """Where the images come from."""

    added = frozenset({"background", "class_names"})

    source: str = "digits"
    """`digits`, `cifar10`, `medmnist:<flag>`, a path to an .npz in MedMNIST's layout, or to a folder with
    train/<class>/ and test/<class>/ (val/ or valid/ optional) of image files."""
    root: str = Field(default_factory=lambda: os.environ.get("FEDFACTORY_DATA", "~/.medmnist"))
    """Folder of downloaded files, on every node; default: $FEDFACTORY_DATA, else ~/.medmnist."""
    download: bool = True
    """Download a missing MedMNIST or CIFAR-10 file."""
    size: Literal[28, 64, 128, 224] = 28
    """Which MedMNIST file to read: the pixels of an image's side."""
    resolution: int | None = Field(None, ge=4)
    """Side in pixels that train, synthesis and test share; default: as stored."""
    background: str = "white"
    """What transparent pixels of image files show: a colour's name, or #rrggbb."""
    class_names: tuple[str, ...] | None = None
    """Names of all classes, in order; a folder may hold some. Default: its subfolders, the numbers of an .npz."""

    @property
    def known_resolution(self) -> int | None:
        """The working resolution, where it is known without opening a file."""
        if self.resolution is not None:
            return self.resolution
        return self.size if self.source.startswith("medmnist:") else NATIVE_RESOLUTION.get(self.source)

    @field_validator("background")
    @classmethod
    def _is_a_colour(cls, background: str) -> str:
        from PIL import ImageColor

        try:
            ImageColor.getrgb(background)
        except ValueError as error:
            raise ValueError(f"background {background!r}: needed a colour's name, such as white, or #rrggbb") from error
        return background

    @field_validator("class_names")
    @classmethod
    def _classes_differ(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is not None and (len(set(names)) < max(2, len(names)) or not all(names)):
            raise ValueError(f"class_names {list(names)}: needed two or more, each another")
        if names is not None and not all(name.isprintable() and len(name) <= 255 for name in names):
            raise ValueError("class_names: needed names of at most 255 characters that can be printed")
        return names and tuple(normalize("NFC", name) for name in names)

    @model_validator(mode="after")
    def _source_is_known(self) -> DataConfig:
        kind, _, flag = self.source.partition(":")
        if kind == "medmnist":
            planar = {
                name for name, info in medmnist_info().items() if "3d" not in name and "multi-label" not in info["task"]
            }
            if flag not in planar:
                raise ValueError(f"source {self.source!r}: needed medmnist:<flag> with a flag of {sorted(planar)}")
        return self


LONGEST_NAME = 128
"""Characters of a name: with what is added to it, a file system takes it."""
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
NAME, EXCLUDED = rf"^{_NAME}$", rf"^{_NAME}(/(0|[1-9][0-9]{{0,8}}))?$"
"""What people name: runs and clients; and a client, or one of its classes by its number."""


class SiloConfig(Section):
    """A client of the scheme `natural`: where its images lie, and which nodes may read them."""

    name: str = Field(pattern=NAME)
    """The client's name."""
    source: str
    """Its images, as for data.source, with a train split; no other node opens it."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom resources of the node where it lies, such as `{"hospital-a": 0.01}` (ray start --resources)."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels of that node, such as `{"site": "hospital-a"}` (ray start --labels)."""


class PartitionConfig(Section):
    """How the training images are dealt to the clients."""

    scheme: Literal["silos", "pathological", "dirichlet", "iid", "skew", "natural"] = "silos"
    """`silos`: one class a client; `pathological`: k classes a client; `dirichlet`: shares drawn from
    Dirichlet(alpha); `iid`: all images shuffled, the same number a client; `skew`: the explicit counts below;
    `natural`: every client has a source of its own."""
    clients: int | None = Field(None, ge=1)
    """Number of clients; default: one a class (`silos`, `pathological`, `dirichlet`, `iid`)."""
    classes_per_client: int = Field(2, ge=1)
    """k of `pathological`."""
    alpha: float = Field(0.1, gt=0)
    """Concentration of `dirichlet`; small values leave hardly a label in common."""
    min_size: int = Field(10, ge=1)
    """Smallest number of images a client may hold."""
    counts: tuple[tuple[int, ...], ...] = ()
    """`skew` only: a row a client, a column a class: how many images it holds."""
    silos: tuple[SiloConfig, ...] = ()
    """`natural` only: the clients. Validation and test splits are those of data.source."""
    exclude: tuple[Annotated[str, Field(pattern=EXCLUDED)], ...] = ()
    """Clients that do not take part (`client-003`), or one of their classes (`client-003/7`); the others hold what they
    would hold anyway. jobs/unlearn.py makes a finished run into one that excludes."""

    @field_validator("exclude")
    @classmethod
    def _order_does_not_matter(cls, exclude: tuple[str, ...]) -> tuple[str, ...]:
        whole = {entry for entry in exclude if "/" not in entry}
        return tuple(sorted({entry for entry in exclude if entry in whole or entry.partition("/")[0] not in whole}))

    @model_validator(mode="after")
    def _counts_go_with_skew(self) -> PartitionConfig:
        if (self.scheme == "skew") != bool(self.counts):
            raise ValueError(
                f"scheme {self.scheme!r} with {len(self.counts)} rows of counts: `counts` goes with `skew`, "
                "one row a client, and with no other scheme"
            )
        if len({len(row) for row in self.counts}) > 1 or any(n < 0 for row in self.counts for n in row):
            raise ValueError("counts: all rows need one column a class, and no number below 0")
        return self

    @model_validator(mode="after")
    def _silos_go_with_natural(self) -> PartitionConfig:
        if (self.scheme == "natural") != bool(self.silos):
            raise ValueError(
                f"scheme {self.scheme!r} with {len(self.silos)} silos: `silos` goes with `natural`, "
                "an entry a client, and with no other scheme"
            )
        names = [silo.name for silo in self.silos]
        if len(set(names)) < len(names):
            raise ValueError(f"silos {names}: every client needs a name of its own")
        return self
