"""Artefacts: what a run makes once and keeps, found again by what determines it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from fedfactory_ray.errors import CardError
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import CARD, WEIGHTS

FORMAT = 2
"""Of the cards that are written. It rises with every new fact, for a version that does not know one would take the card
for damaged and make the artefact again. Older cards are read (those of format 0 have none), and what they lack gets its
default: 2 brought the module's canary and the name of its class."""
DAMAGED = "it is damaged"


def fingerprint(*parts: Any) -> str:
    """SHA-256, in hexadecimal, of `parts`: of their JSON with sorted keys, arrays counting by dtype, shape and bytes.

    Parts are None, booleans, numbers, strings, NumPy arrays, and lists, tuples and dictionaries (by string) of these.
    Raises TypeError for any other value, and ValueError for numbers that are not finite: taken by its text, a value
    would tell nothing apart, or the same apart.
    """
    return hashlib.sha256(json.dumps(_canonical(parts), sort_keys=True, allow_nan=False).encode()).hexdigest()


def _canonical(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_canonical(each) for each in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _canonical(each) for key, each in value.items()}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
        return {"dtype": little.dtype.str, "shape": value.shape, "sha256": hashlib.sha256(little.data).hexdigest()}
    found = f"{type(value).__name__} {value!r}"[:80]
    raise TypeError(
        f"a fingerprint of {found}: needed None, a bool, number, str, array, or a list or dict[str, …] of these"
    )


class Kept(Protocol):
    """Whatever `look` can find at a place in storage: an Artefact, or a unit's file that holds its own card."""

    kind: ClassVar[str]

    @property
    def fingerprint(self) -> str:
        """What determined it; empty where it was made by a version that did not note all of that."""

    @staticmethod
    def mark(place: str) -> str:
        """The file that is there only when all others are."""

    @classmethod
    def read(cls, storage: Storage, place: str) -> Self:
        """What is said to be at `place`. Raises CardError where that cannot be read."""

    def whole(self, storage: Storage, place: str) -> bool:
        """Whether its files are what they were when it was made."""


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """Files in one folder, and facts about them: its card, which is written last. A subclass adds its kind's facts.

    `fingerprint` names all that determines the files; `files` has the SHA-256 of each by its name in the folder.
    """

    fingerprint: str = ""
    files: dict[str, str]
    kind: ClassVar[str]
    renamed: ClassVar[dict[str, str]] = {}
    """Fields that had other names in format 0: old name → name."""

    @property
    def folder(self) -> str:
        """Where it lies in a run's storage."""
        raise NotImplementedError(type(self).__name__)

    @property
    def sha256(self) -> str:
        """SHA-256 of its weights."""
        return self.files[WEIGHTS]

    def to_tree(self) -> dict[str, Any]:
        """The card as JSON values."""
        return {"format": FORMAT, "kind": self.kind, **asdict(self)}

    def to_json(self) -> bytes:
        """The card as JSON with sorted keys."""
        return json.dumps(self.to_tree(), indent=2, sort_keys=True).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Inverse of `to_json`. Raises CardError for what is no card of this kind, or one with facts unknown here."""
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CardError(cls.kind, f"no JSON ({error})") from error
        if not isinstance(tree, dict):
            raise CardError(cls.kind, f"a {type(tree).__name__}")
        return cls.from_tree(tree)

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Self:
        """The card that `tree`, JSON values, tells of. Raises CardError."""
        version, kind = tree.get("format", 0), tree.get("kind", cls.kind)
        tree = {name: value for name, value in tree.items() if name not in ("format", "kind")}
        if version == 0:
            # What determined it was noted in another way, and not wholly.
            tree = {cls.renamed.get(name, name): value for name, value in tree.items() if name != "fingerprint"}
            tree |= {"files": {WEIGHTS: tree.pop("sha256")}} if "sha256" in tree else {}
        known = {field.name: field for field in fields(cls)}
        needed = {name for name, field in known.items() if field.default is field.default_factory is MISSING}
        unknown = ", ".join(sorted(tree.keys() - known.keys()))[:200]
        if type(version) is not int or version not in range(FORMAT + 1):
            raise CardError(cls.kind, f"format {version!r:.80} ({unknown}), where {FORMAT} is known", newer=True)
        if kind != cls.kind or unknown:
            raise CardError(cls.kind, unknown or f"the kind {kind!r:.80}")
        if needed - tree.keys():
            raise CardError(cls.kind, f"nothing of {', '.join(sorted(needed - tree.keys()))}")
        try:
            card: Self = _adapter(cls).validate_python(tree)  # type: ignore[arg-type]
            return card
        except ValidationError as error:
            problem = error.errors()[0]
            raise CardError(cls.kind, f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error

    @staticmethod
    def mark(place: str) -> str:
        """See Kept."""
        return f"{place}/{CARD}"

    @classmethod
    def read(cls, storage: Storage, place: str) -> Self:
        """See Kept."""
        try:
            return cls.from_json(storage.read(cls.mark(place)))
        except CardError as error:
            raise CardError(cls.kind, f"{error.found} in {storage.uri}/{cls.mark(place)}", newer=error.newer) from error

    def whole(self, storage: Storage, place: str) -> bool:
        """See Kept."""
        return all(
            storage.exists(f"{place}/{name}") and storage.sha256(f"{place}/{name}") == digest
            for name, digest in self.files.items()
        )


@cache
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(kind)  # type: ignore[arg-type]


def keep(storage: Storage, artefact: Artefact) -> None:
    """Write the card of an artefact whose files are written: from now on it is found."""
    storage.write(artefact.mark(artefact.folder), artefact.to_json())


K = TypeVar("K", bound=Kept)


class Found(NamedTuple, Generic[K]):
    """What is at a place, or else why that cannot serve; neither where nothing is there."""

    artefact: K | None = None
    why: str = ""


def look(storage: Storage, kind: type[K], place: str, wanted: str) -> Found[K]:
    """The artefact at `place`, if it is whole and of the fingerprint `wanted` (empty: of any).

    Raises CardError for a card of a newer format, lest an older version replaces what it does not understand.
    """
    if not storage.exists(kind.mark(place)):
        return Found()
    try:
        found = kind.read(storage, place)
    except CardError as error:
        if error.newer:
            raise
        return Found(why=DAMAGED)
    if wanted and not found.fingerprint:
        return Found(why="an earlier version made it and did not note all that determined it")
    if wanted and found.fingerprint != wanted:
        return Found(why="other images, settings or arithmetic determined it")
    return Found(found) if found.whole(storage, place) else Found(why=DAMAGED)


def find(storage: Storage, kind: type[K], place: str, wanted: str) -> K | None:
    """As `look`, for those who need no reason."""
    return look(storage, kind, place, wanted).artefact
