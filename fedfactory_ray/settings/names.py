"""Names that the product makes, of runs, by the rule for those that people give."""

from __future__ import annotations

import re
import unicodedata

from fedfactory_ray.settings.data import LONGEST_NAME, NAME


def allowed_name(text: str, otherwise: str) -> str:
    """`text`, or what of it may stand in a NAME: accents go, other characters become dashes. `otherwise` where nothing
    is left."""
    if re.fullmatch(NAME, text):
        return text
    letters = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._]+", "-", letters).strip("._-")[: LONGEST_NAME // 2] or otherwise


def is_folder_name(name: str) -> bool:
    """Whether a folder of runs may hold one of this name; runs were once given names that no new one may have."""
    return name not in ("", ".", "..") and "/" not in name and name.isprintable() and len(name.encode()) <= 255
