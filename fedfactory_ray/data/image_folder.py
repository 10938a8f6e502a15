"""Data source: a folder of image files."""

from __future__ import annotations

import struct
import time
import warnings
import zlib
from collections import Counter
from functools import cached_property
from pathlib import Path
from unicodedata import normalize

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from fedfactory_ray.data.image_files import hidden, image_files
from fedfactory_ray.data.source import Split
from fedfactory_ray.data.transforms import resize
from fedfactory_ray.errors import DataInvalidError

FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""A split and the names that its folder may have."""
LAYOUT = "train/<class>/ and test/<class>/ (val/<class>/ optional) with images, a folder a class"
STACKS = frozenset({"GIF", "TIFF", "WEBP", "PNG", "AVIF"})
"""Formats of files that may hold several pictures, of which the first is read."""
DAMAGES = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
"""What Pillow raises on damaged and on enormous files."""


class ImageFolder:
    """A folder with train/<class>/ and test/<class>/ (val/ optional) of image files, of any kind that Pillow reads.

    Hidden folders and files are skipped, and those of other kinds; `skipped` tells of them. Images are turned as their
    EXIF orientation says, and transparent ones are composited on the colour `background`.
    """

    def __init__(
        self, path: Path, resolution: int | None, class_names: list[str] | None = None, background: str = "white"
    ) -> None:
        self.path, self.resolution = str(path), resolution
        self.background = ImageColor.getrgb(background)[:3]
        self._splits: dict[Split, Path] = {}
        for split, names in FOLDERS.items():
            there = [p for p in _folders(path).values() if p.name.lower() in names]
            if len(there) > 1:
                found = f"the folders {' and '.join(p.name for p in there)}"
                raise DataInvalidError(path, found, f"one of them, for the {split} split")
            if there:
                self._splits[split] = there[0]
        first = self._splits.get("train", self._splits.get("test"))
        self.class_names = class_names or ([] if first is None else list(_folders(first)))
        if first is None or not self.class_names:
            raise DataInvalidError(path, self._found(), LAYOUT)

    def _found(self) -> str:
        """What lies here, for a refusal."""
        told = [f"{p.name}/ with {len(_folders(p))} class folders" for p in self._splits.values()]
        told += [f"no {split}/" for split in FOLDERS if split not in self._splits]
        others = [p.name for p in _folders(Path(self.path)).values() if p not in self._splits.values()]
        few = ", ".join(others[:4]) + f" and {len(others) - 4} more" * (len(others) > 4)
        return ", ".join(told) + f"; folders {few}" * bool(others)

    @cached_property
    def _listed(self) -> tuple[dict[Split, list[tuple[str, int]]], dict[str, int]]:
        """Files with their labels by split, by names of class, folder and file; and how many of which kind are none."""
        files: dict[Split, list[tuple[str, int]]] = {"train": [], "val": [], "test": []}
        skipped: Counter[str] = Counter()
        index = {name: y for y, name in enumerate(self.class_names)}
        skipped["hidden folders"] += sum(hidden(p.name) for p in Path(self.path).iterdir() if p.is_dir())
        for split, folder in self._splits.items():
            classes = _folders(folder)
            strangers = [name for name in classes if name not in index]
            if strangers:
                raise DataInvalidError(folder, f"folders {strangers}", f"only the classes {self.class_names}")
            for entry in folder.iterdir():
                if hidden(entry.name):
                    skipped["hidden folders" if entry.is_dir() else "hidden files"] += 1
                elif not entry.is_dir():
                    skipped["files beside the class folders"] += 1
            for name, of_class in classes.items():
                files[split] += [(file, index[name]) for file in image_files(of_class, skipped)]
        return files, {kind: n for kind, n in sorted(skipped.items()) if n}

    @property
    def _files(self) -> dict[Split, list[tuple[str, int]]]:
        return self._listed[0]

    @property
    def skipped(self) -> dict[str, int]:
        """See Source."""
        return self._listed[1]

    def _open(self, file: str) -> Image.Image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                return Image.open(file)
        except (UnidentifiedImageError, *DAMAGES) as error:
            most = f" of at most {Image.MAX_IMAGE_PIXELS} pixels" if Image.MAX_IMAGE_PIXELS else ""
            raise DataInvalidError(file, f"not a readable image ({error})", f"an intact image file{most}") from error

    @cached_property
    def _mode(self) -> str:
        """`L` where all images are grey, else `RGB`; reads every file's header, and so finds those that are none."""
        modes, shapes, stacks = set(), set(), 0
        grey_background = len(set(self.background)) == 1
        for files in self._files.values():
            for file, _ in files:
                with self._open(file) as image:
                    if image.mode.startswith(("I", "F")):
                        raise DataInvalidError(file, f"pixels of mode {image.mode}", "8 bits a channel")
                    grey = image.mode in ("1", "L", "LA") and (grey_background or not image.has_transparency_data)
                    modes.add("L" if grey else "RGB")
                    shapes.add(image.size)
                    if image.format in STACKS:
                        stacks += getattr(image, "n_frames", 1) - 1
        if stacks:
            self._listed[1]["further pictures of files that hold several"] = stacks
        if self.resolution is None and len(shapes) > 1:
            raise DataInvalidError(
                self.path,
                f"images of mixed shapes {sorted(shapes)[:4]}",
                "one shape, or data.resolution to resize them",
            )
        return modes.pop() if len(modes) == 1 else "RGB"

    def labels(self, split: Split) -> np.ndarray:
        """See Source."""
        return np.array([y for _, y in self._files[split]], dtype=np.int64)

    def images(self, split: Split, indices: np.ndarray | None = None) -> np.ndarray:
        """See Source."""
        files = self._files[split]
        rows = []
        for i in range(len(files)) if indices is None else indices:
            with self._open(files[i][0]) as image:
                try:
                    pixels = self._seen(image)
                except DAMAGES as error:
                    raise DataInvalidError(files[i][0], f"a broken image ({error})", "an intact image file") from error
            rows.append(np.atleast_3d(np.asarray(resize(pixels, self.resolution) if self.resolution else pixels)))
        return np.stack(rows) if rows else np.empty((0, *self.image_shape()), np.uint8)

    def _seen(self, image: Image.Image) -> Image.Image:
        """The image as a person sees it: turned upright, and what is transparent shows the background."""
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            ground = Image.new("RGBA", image.size, (*self.background, 255))
            image = Image.alpha_composite(ground, image.convert("RGBA"))
        return image.convert(self._mode)

    def try_images(self, split: Split, until: float) -> int:
        """Decode a split's images, keeping none, until `time.monotonic()` is `until`; returns how many had no turn.

        Raises DataInvalidError.
        """
        files = self._files[split]
        for tried in range(len(files)):
            if time.monotonic() >= until:
                return len(files) - tried
            self.images(split, np.array([tried]))
        return 0

    def image_shape(self) -> tuple[int, int, int]:
        """See Source."""
        channels = 1 if self._mode == "L" else 3
        if self.resolution:
            return (self.resolution, self.resolution, channels)
        with self._open(next(files[0][0] for files in self._files.values() if files)) as image:
            return (image.height, image.width, channels)


def _folders(folder: Path) -> dict[str, Path]:
    """Folders in a folder that are no hidden ones, by name in its order; a Mac spells accents another way (NFD)."""
    found = {normalize("NFC", p.name): p for p in folder.iterdir() if p.is_dir() and not hidden(p.name)}
    return dict(sorted(found.items()))
