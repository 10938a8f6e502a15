"""Data source: a folder of image files."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fedfactory_ray.data.source import Split
from fedfactory_ray.data.transforms import resize
from fedfactory_ray.errors import DataInvalidError


class ImageFolder:
    """A folder with train/<class>/ and test/<class>/ (val/ optional) of image files."""

    def __init__(self, path: Path, resolution: int | None, class_names: list[str] | None = None) -> None:
        self.path, self.resolution = str(path), resolution
        splits = [path / split for split in ("train", "test") if (path / split).is_dir()]
        if not splits:
            raise DataInvalidError(path, f"{sorted(p.name for p in path.iterdir())}", "subfolders train and test")
        self.class_names = class_names or sorted(p.name for p in splits[0].iterdir() if p.is_dir())
        if not self.class_names:
            raise DataInvalidError(splits[0], "no folders", "one folder a class")

    @cached_property
    def _files(self) -> dict[Split, list[tuple[str, int]]]:
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

        files: dict[Split, list[tuple[str, int]]] = {"train": [], "val": [], "test": []}
        index = {name: y for y, name in enumerate(self.class_names)}
        for split, found in files.items():
            folder = Path(self.path) / split
            if folder.is_dir():
                strangers = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name not in index)
                if strangers:
                    raise DataInvalidError(folder, f"folders {strangers}", f"only the classes {self.class_names}")
                found += make_dataset(str(folder), index, extensions=IMG_EXTENSIONS, allow_empty=True)
        return files

    def _open(self, file: str) -> Image.Image:
        try:
            return Image.open(file)
        except (UnidentifiedImageError, OSError) as error:
            raise DataInvalidError(file, f"not a readable image ({error})", "an intact image file") from error

    @cached_property
    def _mode(self) -> str:
        """`L` where all images are grey, else `RGB`; reads every file's header, and so finds those that are none."""
        modes, shapes = set(), set()
        for files in self._files.values():
            for file, _ in files:
                with self._open(file) as image:
                    if image.mode.startswith(("I", "F")):
                        raise DataInvalidError(file, f"pixels of mode {image.mode}", "8 bits a channel")
                    modes.add("L" if image.mode in ("1", "L") else "RGB")
                    shapes.add(image.size)
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
                    pixels = image.convert(self._mode)
                except (OSError, SyntaxError, ValueError) as error:  # what PIL raises on damaged chunks
                    raise DataInvalidError(files[i][0], f"a broken image ({error})", "an intact image file") from error
            rows.append(np.atleast_3d(np.asarray(resize(pixels, self.resolution) if self.resolution else pixels)))
        return np.stack(rows) if rows else np.empty((0, *self.image_shape()), np.uint8)

    def image_shape(self) -> tuple[int, int, int]:
        """See Source."""
        channels = 1 if self._mode == "L" else 3
        if self.resolution:
            return (self.resolution, self.resolution, channels)
        with self._open(next(files[0][0] for files in self._files.values() if files)) as image:
            return (image.height, image.width, channels)
