"""Sources of images that tests open, and how they are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fedfactory_ray.data.readers import open_source
from fedfactory_ray.data.source import Source, inspect
from fedfactory_ray.errors import DataInvalidError
from fedfactory_ray.settings.data import DataConfig


def source_at(path: Path, **changes: object) -> Source:
    return open_source(DataConfig.model_validate({"source": str(path), **changes}))


def refusal(path: Path, **changes: object) -> str:
    """What a source that has to be refused is refused with."""
    with pytest.raises(DataInvalidError) as error:
        inspect(source_at(path, **changes))
    return str(error.value)


def write_folder(
    root: Path, *, mode: str = "L", side: int = 8, n: int = 3, splits: tuple[str, ...] = ("train", "test")
) -> Path:
    """Class y's images have the value 60 y + 10 i; in RGB that is the first channel."""
    for split in splits:
        for y, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                value = 60 * y + 10 * i
                Image.new(mode, (side, side), value if mode == "L" else (value, 1, 2)).save(
                    root / split / name / f"{i}.png"
                )
    return root
