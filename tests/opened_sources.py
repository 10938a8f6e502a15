"""Sources of images that tests open, and how they are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedfactory_ray.data.readers import open_source
from fedfactory_ray.data.source import Source, inspect
from fedfactory_ray.errors import DataInvalidError
from fedfactory_ray.settings.sections import DataConfig


def source_at(path: Path, **changes: object) -> Source:
    return open_source(DataConfig.model_validate({"source": str(path), **changes}))


def refusal(path: Path, **changes: object) -> str:
    """What a source that has to be refused is refused with."""
    with pytest.raises(DataInvalidError) as error:
        inspect(source_at(path, **changes))
    return str(error.value)
