"""Artefacts: what a fingerprint tells apart, and what is found again, refused or made again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfactory_ray.cluster.stored import find_all
from fedfactory_ray.errors import CardError
from fedfactory_ray.storage.artefact import Artefact, find, fingerprint, keep, look
from fedfactory_ray.storage.checkpoints import Checkpoint, Checkpoints
from fedfactory_ray.storage.files import Storage

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@dataclass(frozen=True)
class Thing(Artefact):
    kind: ClassVar[str] = "thing"
    renamed: ClassVar[dict[str, str]] = {"images": "n_images"}
    name: str
    n_images: int
    note: str = "none"

    @property
    def folder(self) -> str:
        return f"things/{self.name}"


def made(storage: Storage, name: str = "one", made_of: str = "f00d") -> Thing:
    """A thing of two files, kept."""
    files = {file: storage.write(f"things/{name}/{file}", content) for file, content in (("a", b"A"), ("b", b"B"))}
    thing = Thing(name, 3, fingerprint=made_of, files=files)
    keep(storage, thing)
    return thing


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


# Fingerprints


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_equal_values_have_one_fingerprint_whatever_the_order_of_keys(value: Any) -> None:
    again = json.loads(json.dumps(value), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert fingerprint(value) == fingerprint(again)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, 2), (12,)),
        (("1",), (1,)),
        (("a", "bc"), ("ab", "c")),
        (([1, 2], 3), ([1], 2, 3)),
        (({"a": None},), ({},)),
        ((True,), (1,)),
        ((1,), (1.0,)),
        ((np.arange(10),), (np.arange(90, 100),)),
        ((np.arange(4, dtype=np.int64),), (np.arange(4, dtype=np.int32),)),
        ((np.zeros((2, 3), np.uint8),), (np.zeros((3, 2), np.uint8),)),
    ],
)
def test_what_differs_has_another_fingerprint(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert fingerprint(*one) != fingerprint(*other)


def test_an_array_counts_by_its_values_not_by_how_it_lies_in_memory() -> None:
    there = np.arange(12, dtype="<i8").reshape(3, 4)
    assert fingerprint(there) == fingerprint(np.asfortranarray(there)) == fingerprint(there.astype(">i8"))
    assert fingerprint(there[::2]) == fingerprint(there[::2].copy())


@pytest.mark.parametrize(
    "value", [{1: "a"}, {1, 2}, b"bytes", np.int64(3), Path("a"), object(), [Thing("a", 1, files={})], np.array([None])]
)
def test_an_unknown_value_is_refused_instead_of_taken_by_its_text(value: Any) -> None:
    with pytest.raises(TypeError, match="a fingerprint of"):
        fingerprint("settings", {"inside": [value]})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint(value)


# What is there and whole


def test_what_is_kept_is_found_by_its_fingerprint_alone(storage: Storage) -> None:
    thing = made(storage)
    assert find(storage, Thing, "things/one", "f00d") == thing
    assert find(storage, Thing, "things/one", "") == thing
    assert look(storage, Thing, "things/one", "beef").why.startswith("other images, settings or arithmetic")
    assert look(storage, Thing, "things/two", "f00d") == (None, "")


@pytest.mark.parametrize("damage", ["changed", "missing", "torn card", "strange card"])
def test_what_is_damaged_is_not_found(storage: Storage, damage: str) -> None:
    made(storage)
    card = storage.read("things/one/card.json")
    if damage == "changed":
        storage.write("things/one/b", b"X")
    elif damage == "missing":
        storage.delete("things/one/a")
    elif damage == "torn card":
        storage.write("things/one/card.json", card[:-9])
    else:
        storage.write("things/one/card.json", b'["a", "list"]')
    assert look(storage, Thing, "things/one", "f00d") == (None, "it is damaged")


def test_files_without_a_card_are_nothing(storage: Storage) -> None:
    storage.write("things/one/a", b"A")
    assert look(storage, Thing, "things/one", "f00d") == (None, "")


def change(storage: Storage, **facts: Any) -> None:
    storage.write_json("things/one/card.json", storage.read_json("things/one/card.json") | facts)


def test_a_card_of_a_newer_format_is_refused_by_what_is_unknown_in_it(storage: Storage) -> None:
    made(storage)
    change(storage, format=3, canary="new")
    with pytest.raises(CardError, match=r"card of a thing[\s\S]*format 3 \(canary\), where 2 is known[\s\S]*a version"):
        look(storage, Thing, "things/one", "f00d")
    for version in (3, "1", None):  # of known facts alone, too: an older version would replace it
        made(storage)
        change(storage, format=version)
        with pytest.raises(CardError, match="where 2 is known"):
            look(storage, Thing, "things/one", "f00d")
    made(storage)
    change(storage, canary="new")
    assert look(storage, Thing, "things/one", "f00d").why == "it is damaged"


def test_a_card_of_an_older_format_is_read_and_what_it_lacks_gets_its_default(storage: Storage) -> None:
    old = Thing.from_json(json.dumps({"name": "one", "images": 3, "sha256": "abcd"}).encode())
    assert old == Thing("one", 3, "none", files={"model.safetensors": "abcd"})
    assert old.fingerprint == ""
    storage.write_json("things/one/card.json", {"name": "one", "images": 3, "sha256": "abcd"})
    assert look(storage, Thing, "things/one", "f00d").why.startswith("an earlier version made it")


def test_facts_of_another_type_are_refused(storage: Storage) -> None:
    with pytest.raises(CardError, match=r"n_images: Input should be a valid integer"):
        Thing.from_json(json.dumps({"name": "one", "n_images": "many", "files": {}}).encode())
    with pytest.raises(CardError, match="nothing of n_images"):
        Thing.from_json(json.dumps({"name": "one", "files": {}}).encode())
    with pytest.raises(CardError, match="kind 'module'"):
        Thing.from_json(json.dumps({"kind": "module", "name": "one", "n_images": 1, "files": {}}).encode())


def test_many_are_looked_at_by_workers_while_actors_hold_every_cpu(
    cluster: None, storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    @ray.remote(num_cpus=1)
    class Holder:
        def ready(self) -> None:
            pass

    def checkpoint(place: str) -> Checkpoint:
        files = {"a": storage.write(f"{place}/a", b"A")}
        found = Checkpoint(fingerprint="f00d", files=files, place=place, step=1)
        keep(storage, found)
        return found

    things = {place: checkpoint(place) for place in (f"work/{name}" for name in "abcdefg")}
    storage.write("work/c/a", b"X")
    wanted = dict.fromkeys(things, "f00d") | {"work/d": "beef", "work/never": "f00d"}
    holders = [Holder.remote() for _ in range(2)]
    ray.get([holder.ready.remote() for holder in holders])
    with caplog.at_level("INFO"):
        found = find_all(storage, Checkpoint, wanted)
        assert find_all(storage, Checkpoint, {"nothing/here": "f00d"}) == {}
    assert found == {place: things[place] for place in things if place[-1] not in "cd"}
    assert [record.message for record in caplog.records] == [
        "5 checkpoints there and kept; 1 made again: it is damaged; "
        "1 made again: other images, settings or arithmetic determined it"
    ]
    for holder in holders:
        ray.kill(holder)


# Checkpoints


def test_the_newest_whole_checkpoint_of_the_same_work_counts(storage: Storage) -> None:
    ours, others = (Checkpoints(storage, "work", made_of * 8) for made_of in ("ab", "cd"))
    assert ours.newest() is None
    others.save(9, {"state": b"theirs"})
    ours.save(1, {"state": b"one", "more": b"1"}, {"losses": [0.5]})
    newest = ours.newest()
    assert newest is not None
    assert (newest.step, newest.state, ours.read(newest, "state")) == (1, {"losses": [0.5]}, b"one")
    # The second is written in pieces by others, and counts when it is sealed; then the first goes.
    digest = storage.write(ours.file(2, "state"), b"two")
    assert ours.newest() == newest
    ours.seal(2, {"state": digest})
    assert [name for name in storage.names("work") if "/0000" in name and "cdcd" not in name] == [
        ours.file(2, name) for name in ("card.json", "state")
    ]
    storage.write(ours.file(2, "state"), b"damaged")
    assert ours.newest() is None
    ours.delete()
    assert storage.names("") == []
