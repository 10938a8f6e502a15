"""Modules as files: how they travel between organisations that share no cluster."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import ray
from pydantic import ValidationError
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from fedfactory_ray.data.source import DataInfo
from fedfactory_ray.errors import CardError, DataMissingError, ModuleRefusedError
from fedfactory_ray.generation.card import LARGEST_CARD, ModuleCard
from fedfactory_ray.settings.data import NAME
from fedfactory_ray.settings.sections import GeneratorConfig
from fedfactory_ray.storage.artefact import keep
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import CARD, MODULE_CARD, MODULES, WEIGHTS, module_folder

FOLDER = re.compile(r"/class-[^/]*$")
LIKELY = 1000
"""How many times as many images as others have of their classes a client may tell of: beyond that its module would be
all that is drawn of a class."""


def offered_cards(uri: str, info: DataInfo, min_images: int = 1) -> list[ModuleCard]:
    """The cards of the modules below `uri` (`modules/<client>/class-<y>/`), each fit for the data set `info` and of at
    least `min_images` images.

    A folder without a card is a module that its client has not finished. Raises DataMissingError where there is none,
    ModuleRefusedError for a card that cannot be trusted.
    """
    storage = Storage(uri)
    carded = list(_carded(storage))
    if not carded:
        raise DataMissingError(f"{storage.uri}/{MODULES}/<client>/class-<y>/{CARD}", None, "jobs/train_client.py")
    cards = [_read_card(storage, folder, info) for folder in carded]
    most = LIKELY * max(*(n for counts in info.counts.values() for n in counts), _median(cards), 1)
    for card in cards:
        if card.n_images < min_images:
            found = f"trained on {card.n_images} images of class {info.class_names[card.label]!r}"
            mend = "the client's same jobs/train_client.py takes it back"
            raise ModuleRefusedError(*card.key, f"{found}, needed generator.min_images={min_images}: {mend}")
        if card.n_images > most:
            reason = f"its card tells of {card.n_images} images, more than {most}: {LIKELY} times what others have"
            raise ModuleRefusedError(*card.key, reason)
    return cards


def _carded(storage: Storage) -> Iterator[str]:
    """Folders of modules in which something is called a card. Raises ModuleRefusedError for what nobody can name."""
    for client, is_folder in storage.entries(MODULES).items():
        name = client.rpartition("/")[2]
        if is_folder and not name.isprintable():
            raise ModuleRefusedError(name, 0, "its folder's name holds characters that nobody can type")
        for place, holds in storage.entries(client).items() if is_folder else ():
            if FOLDER.search(place) and not holds:
                raise ModuleRefusedError(name, 0, f"{place!r:.150} is no folder")
            if FOLDER.search(place) and (not place.isprintable() or f"{place}/{CARD}" in storage.entries(place)):
                yield place


def _median(cards: list[ModuleCard]) -> int:
    return sorted(card.n_images for card in cards)[(len(cards) - 1) // 2]


def _read_card(storage: Storage, folder: str, info: DataInfo) -> ModuleCard:
    place = MODULE_CARD.fullmatch(f"{folder}/{CARD}")
    client, number = folder.split("/")[1:]
    label = int(place["label"]) if place else 0

    def refuse(reason: str) -> ModuleRefusedError:
        return ModuleRefusedError(client, label, reason)

    if place is None or module_folder(client, label) != folder or not re.fullmatch(NAME, client):
        raise refuse(f"its folder is {client!r:.150}, {number!r:.150}; needed letters, digits and ._-, and class-000")
    for name in (CARD, WEIGHTS):
        if not storage.is_plain(f"{folder}/{name}"):
            raise refuse(f"{name} is missing beside its card" if name == WEIGHTS else f"{name} is no plain file")
    try:
        if storage.size(f"{folder}/{CARD}") > LARGEST_CARD:
            raise CardError(ModuleCard.kind, f"more than {LARGEST_CARD} bytes")
        card = ModuleCard.read(storage, folder)
        GeneratorConfig(**card.generator).check_resolution(card.resolution)
    except ValidationError as error:
        raise refuse(f"its card's generator: {error.errors()[0]['msg']}"[:300]) from error
    except (CardError, ValueError, TypeError) as error:
        raise refuse(f"its card cannot be read ({error})"[:600]) from error
    if card.key != (client, label):
        raise refuse(
            f"it lies in the folder of {client!r}, class {label}, its card says {card.client!r}, {card.label!r}"
        )
    if label >= info.classes:
        raise refuse(f"class {label}, the data set has {info.classes}")
    if card.class_name not in ("", info.class_names[label]):
        raise refuse(
            f"its class {label} is {card.class_name!r}, the data set's {info.class_names[label]!r}; the client's same "
            f"jobs/train_client.py with --class-names {' '.join(info.class_names)} numbers them alike"
        )
    if (card.resolution, card.channels) != (info.resolution, info.channels):
        raise refuse(
            f"images of side {card.resolution} with {card.channels} channels, "
            f"the data set has side {info.resolution} and {info.channels}"
        )
    if card.n_images < 1:
        raise refuse(f"trained on {card.n_images} images")
    if set(card.files) != {WEIGHTS}:
        raise refuse(f"it is of files {sorted(card.files)!r:.200}, needed {WEIGHTS}")
    if not re.fullmatch("[0-9a-f]{64}", card.sha256):
        raise refuse(f"its card says SHA-256 {card.sha256!r:.100}, needed 64 hexadecimal digits")
    size = storage.size(f"{folder}/{WEIGHTS}")
    if size != card.size:
        raise refuse(f"{WEIGHTS} is of {size} bytes, its card says {card.size}")
    return card


def set_sha256(cards: list[ModuleCard]) -> str:
    """SHA-256 that names a set of modules."""
    return hashlib.sha256("".join(f"{c.client}/{c.label}/{c.sha256}\n" for c in cards).encode()).hexdigest()


def import_modules(uri: str, storage: Storage, cards: list[ModuleCard]) -> None:
    """Verify the modules below `uri`, weights included, and copy them into a run's storage.

    Raises ModuleRefusedError, with the client's name; then none of its files was copied.
    """
    asked = {_import_module.remote(Storage(uri), storage, card): card for card in cards}
    for reference, card in asked.items():
        try:
            ray.get(reference)
        except (WorkerCrashedError, OutOfMemoryError) as error:
            raise ModuleRefusedError(*card.key, "the process that looked at its weights ended") from error


@ray.remote(max_retries=1)
def _import_module(origin: Storage, storage: Storage, card: ModuleCard) -> None:
    import_module(origin, storage, card)


def import_module(origin: Storage, storage: Storage, card: ModuleCard) -> None:
    """Verify a module, the cheapest first, and copy it; no network is allocated. Raises ModuleRefusedError."""
    from fedfactory_ray.generation.module import make_blueprint, refuse_other_bytes, verified

    weights = origin.read(f"{card.folder}/{WEIGHTS}")
    refuse_other_bytes(weights, card)
    verified(weights, card, make_blueprint(card))
    storage.write(f"{card.folder}/{WEIGHTS}", weights)
    keep(storage, card)
