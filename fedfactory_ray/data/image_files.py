"""Which files of a folder are images, and what is passed over."""

from __future__ import annotations

import os
import stat
from collections import Counter
from functools import cache

from PIL import Image
from PIL.ImageFile import StubImageFile

from fedfactory_ray.errors import DataInvalidError

SYSTEM = frozenset({"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"})
"""Folders that archives, network drives and file systems leave."""
NOT_OPENED = frozenset({"EPS", "MPEG"})
"""Formats that Pillow gives to another program to run, or only recognises."""


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes, in lower case with their dot, of the files that Pillow reads by itself."""
    suffixes = Image.registered_extensions()
    openers = {name: entry[0] for name, entry in Image.OPEN.items() if name not in NOT_OPENED}
    stubs = {name for name, opener in openers.items() if isinstance(opener, type) and issubclass(opener, StubImageFile)}
    return frozenset(suffix for suffix, name in suffixes.items() if name in openers.keys() - stubs)


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is none that a person put there: `.ipynb_checkpoints`, `._x.png`."""
    return name.startswith(".") or name.lower() in SYSTEM


def image_files(folder: str | os.PathLike[str], skipped: Counter[str]) -> list[str]:
    """The image files below a folder, by folder and name; links are followed. What is passed over is counted in
    `skipped` by its kind. Raises DataInvalidError for a link that leads back, and for what has an image's name but is
    no file: to read it would never end."""
    walked = []
    for root, folders, names in os.walk(folder, followlinks=True):
        skipped["hidden folders"] += sum(map(hidden, folders))
        folders[:] = [name for name in folders if not hidden(name)]
        for name in folders:
            _refuse_circle(os.path.join(root, name))
        walked.append((root, names))
    found = []
    for root, names in sorted(walked):
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            if hidden(name):
                skipped["hidden files"] += 1
            elif suffix in image_suffixes():
                found.append(_plain_file(os.path.join(root, name)))
            else:
                skipped[f"{suffix or 'nameless'} files (Pillow reads none)"] += 1
    return found


def _refuse_circle(folder: str) -> None:
    """Raise DataInvalidError for a link to a folder that it lies in."""
    if os.path.islink(folder):
        target, parent = os.path.realpath(folder), os.path.realpath(os.path.dirname(folder))
        if os.path.commonpath([target, parent]) == target:
            raise DataInvalidError(folder, f"a link that leads back to {target}", "a folder without it")


def _plain_file(path: str) -> str:
    try:
        kind = os.stat(path).st_mode
    except OSError as error:
        raise DataInvalidError(path, f"no readable file ({error.strerror})", "an image file") from error
    if not stat.S_ISREG(kind):
        raise DataInvalidError(path, "a pipe, socket or device", "an image file")
    return path
