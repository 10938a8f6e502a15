"""Modules as files: how they travel between organisations that share no cluster."""

from __future__ import annotations

import hashlib
import re

import ray
from pydantic import ValidationError

from fedfactory_ray.data.source import DataInfo
from fedfactory_ray.errors import CardError, DataMissingError, ModuleRefusedError
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.settings.data import NAME
from fedfactory_ray.settings.sections import GeneratorConfig
from fedfactory_ray.storage.artefact import keep
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import CARD, MODULE_CARD, MODULES, WEIGHTS, module_folder


def offered_cards(uri: str, info: DataInfo) -> list[ModuleCard]:
    """The cards of the modules below `uri` (`modules/<client>/class-<y>/`), each fit for the data set `info`.

    Raises DataMissingError where there is none, ModuleRefusedError for a card that cannot be trusted.
    """
    storage = Storage(uri)
    places = [found for found in map(MODULE_CARD.fullmatch, storage.names(MODULES)) if found]
    if not places:
        raise DataMissingError(f"{storage.uri}/{MODULES}/<client>/class-<y>/{CARD}", None, "jobs/train_client.py")
    return [_read_card(storage, place["client"], int(place["label"]), info) for place in places]


def _read_card(storage: Storage, client: str, label: int, info: DataInfo) -> ModuleCard:
    def refuse(reason: str) -> ModuleRefusedError:
        return ModuleRefusedError(client, label, reason)

    try:
        card = ModuleCard.read(storage, module_folder(client, label))
        GeneratorConfig(**card.generator).check_resolution(card.resolution)
    except ValidationError as error:
        raise refuse(f"its card's generator: {error.errors()[0]['msg']}") from error
    except (CardError, ValueError, TypeError) as error:
        raise refuse(f"its card cannot be read ({error})") from error
    if card.key != (client, label) or not re.fullmatch(NAME, client):
        raise refuse(
            f"it lies in the folder of {client!r}, class {label}, its card says {card.client!r}, {card.label!r}"
        )
    if not 0 <= label < info.classes:
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
        raise refuse(f"it is of files {sorted(card.files)}, needed {WEIGHTS}")
    if not storage.exists(f"{card.folder}/{WEIGHTS}"):
        raise refuse(f"{WEIGHTS} is missing beside its card")
    return card


def set_sha256(cards: list[ModuleCard]) -> str:
    """SHA-256 that names a set of modules."""
    return hashlib.sha256("".join(f"{c.client}/{c.label}/{c.sha256}\n" for c in cards).encode()).hexdigest()


def import_modules(uri: str, storage: Storage, cards: list[ModuleCard]) -> None:
    """Verify the modules below `uri`, weights included, and copy them into a run's storage.

    Raises ModuleRefusedError, with the client's name; then none of its files was copied.
    """
    ray.get([_import_module.remote(Storage(uri), storage, card) for card in cards])


@ray.remote
def _import_module(origin: Storage, storage: Storage, card: ModuleCard) -> None:
    from fedfactory_ray.generation.module import load_weights, make_denoiser

    weights = origin.read(f"{card.folder}/{WEIGHTS}")
    load_weights(make_denoiser(card), weights, card)
    storage.write(f"{card.folder}/{WEIGHTS}", weights)
    keep(storage, card)
