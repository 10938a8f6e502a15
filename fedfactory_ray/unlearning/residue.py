"""Residue: files of the old and of the new run that hold something forgotten, or that nobody accounts for."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fedfactory_ray.errors import FedFactoryError
from fedfactory_ray.storage import layout
from fedfactory_ray.storage.files import TEMPORARY, Storage
from fedfactory_ray.storage.lease import Holder
from fedfactory_ray.tracking.curves import expert_run
from fedfactory_ray.tracking.outbox import read_outbox
from fedfactory_ray.unlearning.certificate import Certificate, audit_lines
from fedfactory_ray.unlearning.deletion import HELD, LEFT
from fedfactory_ray.unlearning.facts import AT_ONCE, Facts, classes_held, weights
from fedfactory_ray.unlearning.request import Request

TEXTS = layout.FILES - {layout.INDICES, layout.TABLE, layout.PLOT, layout.OUTBOX}
"""Files of every run that tell of settings, counts and scores, and hold nothing of a client."""
LARGEST = 2**28
"""Bytes of the largest JSON file that is read."""
PNG = b"\x89PNG\r\n\x1a\n"


def refuse_residue(found: list[str]) -> None:
    """Raise RuntimeError where something is left that should be gone."""
    if found:
        raise RuntimeError(f"left of what has to be forgotten, or of nobody knows what: {'; '.join(found)}")


def digests_of(storage: Storage) -> dict[str, str]:
    """SHA-256 of every file of a folder, by name."""
    names = storage.names("")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(names, pool.map(storage.sha256, names), strict=True))


def files_to_go(old: Storage, new: Storage) -> list[dict[str, str]]:
    """Files of the old run whose content the new one does not have, with their SHA-256; not those of TEXTS."""
    kept = set(digests_of(new).values())
    found = {name: digest for name, digest in digests_of(old).items() if name not in {*TEXTS, *HELD}}
    return [{"file": name, "sha256": digest} for name, digest in found.items() if digest not in kept]


def left_in_old(old: Storage) -> list[str]:
    """Files of a deleted run that should be gone."""
    return [f"{old.uri}/{name}" for name in old.names("") if name not in (*LEFT, *HELD)]


def left_in_new(new: Storage, after: Facts) -> list[str]:
    """Files of the new run that it does not account for, and that jobs/compare.py may not have added since. An unknown
    one (a checkpoint, say) counts as left."""
    accounted = weights(after)
    cards = {f"{posixpath.dirname(name)}/{layout.CARD}" for name in accounted}
    units = {shard.file for shard in after.shards} | {note.mark(note.folder) for note in after.divergences}
    clients = classes_held(new)
    lone = layout.lone_classifier("")
    ours = lone if after.classifier is None else f"{lone}|{layout.METHOD}/"
    compared = [rf"{layout.CLASSIFIERS}/(?!{ours})[^/]+"]
    compared += [re.escape(layout.classifier_folder(layout.lone_classifier(client))) for client in clients]
    compared += [re.escape(layout.expert_folder(client)) for client in clients if client not in after.experts]
    finished = re.compile(f"({'|'.join(compared)})/({re.escape(layout.WEIGHTS)}|{re.escape(layout.CARD)})")
    known = layout.FILES | {*HELD} | cards | units | accounted.keys()
    return [f"{new.uri}/{name}" for name in new.names("") if name not in known and not finished.fullmatch(name)]


def untold(new: Storage, clients: Sequence[str]) -> list[str]:
    """The file of what MLflow did not take yet, where that would begin a run of one of `clients`."""
    names = {name for client in clients for name in (client, expert_run(client))}
    entries = read_outbox(new)
    return [f"{new.uri}/{layout.OUTBOX}"] * any(each.call == "begin" and each.name in names for each in entries)


def deleted_content(storage: Storage, deleted: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Files of a folder, whatever their names, that are what was deleted, byte for byte."""
    gone = {entry["sha256"] for kind in ("files", "modules", "weights") for entry in deleted.get(kind, [])}
    return [f"{storage.uri}/{name}" for name, digest in digests_of(storage).items() if digest in gone]


def misplaced(storage: Storage, *, old: bool = False) -> list[str]:
    """Files of a folder whose content is not what belongs under their names; of the new run's modules, units, and the
    weights that its facts tell of, other checks know more."""
    kinds: dict[str, Callable[[bytes], object]] = {
        layout.FORGOTTEN: lambda text: Request.of(json.loads(text)),
        layout.PENDING: lambda text: Request.of(json.loads(text)),
        layout.CERTIFICATE: Certificate.from_json,
        layout.AUDIT: lambda _: audit_lines(storage),
        layout.OUTBOX: lambda text: [json.loads(line) for line in text.splitlines()],
        layout.PLOT: _is_picture,
    }
    kinds |= dict.fromkeys(HELD, lambda text: Holder(**json.loads(text)))
    wrong = []
    for name in storage.names(""):
        if name in kinds:
            read = kinds[name]
        elif posixpath.basename(name) == layout.WEIGHTS:
            continue  # its digest is looked at
        elif name.endswith((".json", TEMPORARY)):
            read = json.loads
        else:
            continue
        try:
            read(storage.read(name) if storage.size(name) <= LARGEST else b"")
        except (ValueError, TypeError, KeyError, RecursionError, FedFactoryError):
            wrong.append(f"{storage.uri}/{name}")
    return wrong + ([] if old else _strange_weights(storage))


def _strange_weights(storage: Storage) -> list[str]:
    """Weights that are not what the card beside them says."""
    wrong = []
    for name in storage.names(""):
        folder, file = posixpath.split(name)
        if file == layout.WEIGHTS:
            card = f"{folder}/{layout.CARD}"
            try:
                tree = storage.read_json(card)
                said = tree.get("files", {layout.WEIGHTS: tree.get("sha256")})[layout.WEIGHTS]
            except (OSError, AttributeError, KeyError, TypeError, FedFactoryError):
                said = ""
            if storage.sha256(name) != said:
                wrong.append(f"{storage.uri}/{name}")
    return wrong


def _is_picture(content: bytes) -> None:
    if not content.startswith(PNG):
        raise ValueError("no picture")
