"""The card beside a fitted classifier in storage: what it was made from, and the digest of its weights."""

from __future__ import annotations

from typing import Any

from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import WEIGHTS


def verified_card(storage: Storage, folder: str, fingerprint: str) -> dict[str, Any] | None:
    """The card in `folder`, or None where it is missing, of another fingerprint, or its weights do not verify."""
    if not storage.exists(f"{folder}/card.json") or not storage.exists(f"{folder}/{WEIGHTS}"):
        return None
    card: dict[str, Any] = storage.read_json(f"{folder}/card.json")
    whole = card["fingerprint"] == fingerprint and card["sha256"] == storage.sha256(f"{folder}/{WEIGHTS}")
    return card if whole else None
