"""What every data source offers, and the check of a whole source before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from fedfactory_ray.errors import DataInvalidError

LONGEST_NAME = 255
"""Characters of a class's name."""
Split = Literal["train", "val", "test"]


class Source(Protocol):
    """Where images lie. Reading labels never reads images; reading images reads the asked ones only."""

    path: str
    class_names: list[str]

    @property
    def skipped(self) -> Mapping[str, int]:
        """How many files and folders were passed over, by their kind."""

    def labels(self, split: Split) -> np.ndarray:
        """Labels of a split, int64 (n,); empty where there is no such split."""

    def images(self, split: Split, indices: np.ndarray | None = None) -> np.ndarray:
        """Images uint8 (n, side, side, channels) at `indices`, in their order; all of the split by default."""

    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels at the working resolution."""


@dataclass(frozen=True)
class Task:
    """What a classifier is made for: its network follows from it and from the configuration."""

    classes: int
    channels: int
    resolution: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.resolution, self.resolution, self.channels


@dataclass(frozen=True)
class DataInfo:
    """What everybody may know of a data set: no image, only names, shape and counts, of labels in each split and of
    files that were skipped, by kind."""

    class_names: list[str]
    resolution: int
    channels: int
    counts: dict[str, list[int]]
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def task(self) -> Task:
        """What a classifier of these images is made for."""
        return Task(self.classes, self.channels, self.resolution)


def told_skipped(where: str, skipped: Mapping[str, int]) -> str:
    """A line on what was passed over."""
    return f"{where}: skipped " + ", ".join(f"{n} {kind}" for kind, n in skipped.items())


def inspect(source: Source, *, trains: bool = True, tests: bool = True) -> tuple[DataInfo, np.ndarray]:
    """Check a whole source without reading an image more than needed; returns its facts and its training labels.

    `trains` asks for training images of every class, `tests` for test images.
    Raises DataInvalidError for labels outside the range, classes without training images, and odd shapes.
    """
    classes = len(source.class_names)
    strange = [name for name in source.class_names if not name.isprintable() or len(name) > LONGEST_NAME]
    if strange:
        printable = f"names of at most {LONGEST_NAME} characters that can be printed"
        raise DataInvalidError(source.path, f"a class named {strange[0]!r:.300}", printable)
    counts: dict[str, list[int]] = {}
    splits: tuple[Split, ...] = ("train", "val", "test")
    for split in splits:
        labels = source.labels(split)
        if labels.size and (labels.min() < 0 or labels.max() >= classes):
            raise DataInvalidError(
                source.path,
                f"{split} labels from {labels.min()} to {labels.max()}",
                f"labels from 0 to {classes - 1}",
            )
        counts[split] = np.bincount(labels, minlength=classes).tolist()
    skipped, needs = dict(source.skipped), "train/<class>/ and test/<class>/, or an .npz with both splits"
    if (trains or tests) and classes < 2:
        found = f"one class, {', '.join(source.class_names)}"
        raise DataInvalidError(source.path, found, "two classes or more; data.class_names tells those not held here")
    for split, needed in (("train", trains), ("test", tests)):
        if needed and not sum(counts[split]):
            held = ", ".join(f"{name} {sum(n)}" for name, n in counts.items())
            found = told_skipped(f"no {split} images: {held}", skipped) if skipped else f"no {split} images: {held}"
            raise DataInvalidError(source.path, found, f"images of a train and a test split: {needs}")
    empty = [name for name, n in zip(source.class_names, counts["train"], strict=True) if n == 0]
    if trains and empty:
        found, wanted = f"no training image of class {', '.join(empty[:5])}", "images of every class"
        if len(empty) > 5:
            found += f" and {len(empty) - 5} more"
            wanted += f"; is label {source.labels('train').max()} a mark of images without a class?"
        raise DataInvalidError(source.path, told_skipped(found, skipped) if skipped else found, wanted)
    height, width, channels = source.image_shape()
    if height != width or channels not in (1, 3):
        mend = "; data.resolution cuts their centre square" if channels in (1, 3) else ""
        found = f"images of {height}×{width} with {channels} channels"
        raise DataInvalidError(source.path, found, f"square images, grey or RGB{mend}")
    return DataInfo(source.class_names, height, channels, counts, dict(source.skipped)), source.labels("train")
