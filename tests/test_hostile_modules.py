"""Modules from strangers: whatever lies in the exchange is refused by its client's name, before anything is built."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from fuzz import fuzzed, json_values, little_memory
from hypothesis import given
from hypothesis import strategies as st
from made_modules import GENERATOR, write_module

from fedfactory_ray.data.source import DataInfo
from fedfactory_ray.errors import CardError, DataMissingError, ModuleRefusedError
from fedfactory_ray.federation.exchange import import_module, offered_cards
from fedfactory_ray.generation import module
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.settings.command_line import make_config
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.synthesis.plan import Unit
from fedfactory_ray.synthesis.synthesize import Synthesizer

INFO = DataInfo(["a", "b"], 8, 1, {"train": [0, 0], "val": [0, 0], "test": [30, 30]})
CLIENT = "north"


def take(exchange: Path, run: Path) -> list[ModuleCard]:
    """What a run does with an exchange, in this process."""
    cards = offered_cards(str(exchange), INFO)
    for card in cards:
        import_module(Storage(str(exchange)), Storage(str(run)), card)
    return cards


def card(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tree = json.loads((folder / "card.json").read_text())
        (folder / "card.json").write_text(json.dumps(tree | changes))

    return change


def network(**changes: Any) -> Callable[[Path], None]:
    return card(generator=GENERATOR.model_dump(mode="json") | changes)


def text(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "card.json").write_bytes(content) and None


def weights(make: Callable[[bytes], bytes], *, told: bool = True) -> Callable[[Path], None]:
    """Other weights, of which the card tells the truth."""

    def change(folder: Path) -> None:
        content = make((folder / "model.safetensors").read_bytes())
        (folder / "model.safetensors").write_bytes(content)
        if told:
            card(size=len(content), files={"model.safetensors": module.digest(content)})(folder)

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def make(content: bytes) -> bytes:
        found = safetensors.torch.load(content)
        change(found)
        return safetensors.torch.save(found)

    return weights(make)


def header(tree: object) -> Callable[[Path], None]:
    encoded = json.dumps(tree).encode()
    return weights(lambda _: struct.pack("<Q", len(encoded)) + encoded + b"\0" * 64)


def instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).rename(folder / "elsewhere")
        make(folder / name)

    return change


def moved(client: str, name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        target = folder.parents[1] / client / name
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)

    return change


def link(path: Path) -> None:
    path.symlink_to(path.with_name("elsewhere"))


NESTED = b'{"format": 2, "generator": ' + b'{"a": ' * 5000 + b"1" + b"}" * 5001
HOSTILE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    # what lies there
    "card a FIFO": ("no plain file", instead("card.json", os.mkfifo)),
    "card a folder": ("no plain file", instead("card.json", Path.mkdir)),
    "card a link": ("no plain file", instead("card.json", link)),
    "weights a FIFO": ("missing", instead("model.safetensors", os.mkfifo)),
    "weights a folder": ("missing", instead("model.safetensors", Path.mkdir)),
    "weights a link": ("missing", instead("model.safetensors", link)),
    "weights endless": ("missing", instead("model.safetensors", lambda path: path.symlink_to("/dev/zero"))),
    # whose it is
    "class in four digits": ("its folder is", moved(CLIENT, "class-0000")),
    "class in two digits": ("its folder is", moved(CLIENT, "class-00")),
    "class in Arabic digits": ("its folder is", moved(CLIENT, "class-٠٠٠")),
    "class below 0": ("its folder is", moved(CLIENT, "class--01")),
    "class of many digits": ("its folder is", moved(CLIENT, f"class-{'1' * 200}")),
    "client of another alphabet": ("its folder is", moved("nörth", "class-000")),
    "client hidden": ("its folder is", moved(".north", "class-000")),
    "client with a line": ("nobody can type", moved("north\n", "class-000")),
    "class with a line": ("its folder is", moved(CLIENT, "class-000\n")),
    "class a file": ("is no folder", lambda folder: folder.with_name("class-001").write_text("")),
    "client's name long": ("its folder is", moved("n" * 200, "class-000")),
    "another's folder": ("it lies in the folder of", card(client="south")),
    "another's class": ("it lies in the folder of", card(label=1)),
    # the card as text
    "empty": ("cannot be read", text(b"")),
    "half": ("cannot be read", text(b'{"format": 2, "client"')),
    "no UTF-8": ("cannot be read", text(b'{"client": "\xff"}')),
    "a list": ("cannot be read", text(b"[]")),
    "a number": ("cannot be read", text(b"7")),
    "deep": ("cannot be read", text(NESTED)),
    "deep lists": ("cannot be read", text(b"[" * 60_000)),
    "large": ("more than 65536 bytes", text(b'{"a": "' + b"x" * 10**6 + b'"}')),
    "many digits": ("cannot be read", text(b'{"format": ' + b"1" * 5000 + b"}")),
    # its types and ranges
    "format a list": ("cannot be read", card(format=[2])),
    "format a text": ("cannot be read", card(format="2")),
    "format true": ("cannot be read", card(format=True)),
    "format a fraction": ("cannot be read", card(format=2.0)),
    "kind a list": ("cannot be read", card(kind=["module"])),
    "no kind of ours": ("cannot be read", card(kind="expert")),
    "client a number": ("cannot be read", card(client=7)),
    "client a path": ("cannot be read", card(client="../../north")),
    "label a text": ("cannot be read", card(label="0")),
    "label a fraction": ("cannot be read", card(label=0.0)),
    "label true": ("cannot be read", card(label=False)),
    "images a text": ("cannot be read", card(n_images="5")),
    "images none": ("trained on 0 images", card(n_images=0)),
    "images below 0": ("cannot be read", card(n_images=-5)),
    "images 10^15": ("cannot be read", card(n_images=10**15)),
    "images 10^6": ("more than 30000: 1000 times", card(n_images=10**6)),
    "images infinite": ("cannot be read", text(b'{"n_images": 1e999}')),
    "side 0": ("cannot be read", card(resolution=0)),
    "side below 0": ("cannot be read", card(resolution=-8)),
    "side 10^9": ("cannot be read", card(resolution=10**9)),
    "channels 0": ("cannot be read", card(channels=0)),
    "channels 10^6": ("cannot be read", card(channels=10**6)),
    "steps a text": ("cannot be read", card(steps="many")),
    "precision unknown": ("cannot be read", card(precision="int8")),
    "size below 0": ("cannot be read", card(size=-1)),
    "size 10^18": ("cannot be read", card(size=10**18)),
    "size of others": ("bytes, its card says 17", card(size=17)),
    "canary a text": ("cannot be read", card(canary="sing" * 10)),
    "class name long": ("cannot be read", card(class_name="a" * 1000)),
    "class name another": ("is 'b'", card(class_name="b")),
    "files a list": ("cannot be read", card(files=["model.safetensors"])),
    "files elsewhere": ("it is of files", card(files={"../../x": "0" * 64})),
    "files none": ("it is of files", card(files={})),
    "digest no digest": ("SHA-256", card(files={"model.safetensors": "0"})),
    # its network
    "network a list": ("cannot be read", card(generator=[1])),
    "network a number": ("cannot be read", card(generator=8)),
    "network without": ("cannot be built|SHA|missing or unknown|numbers", card(generator={})),
    "network with more": ("generator", network(more=1)),
    "network with code": ("generator", network(**{"__class__": "os.system"})),
    "levels none": ("generator", network(channels=[])),
    "levels 9": ("generator", network(channels=[8] * 9)),
    "levels 10^4": ("generator", network(channels=[8] * 10_000)),
    "channels 8 × 10^9": ("generator", network(channels=[8 * 10**9])),
    "channels 4096": ("bytes hold", network(channels=[4096])),
    "channels 0 in a level": ("generator", network(channels=[0])),
    "channels below 0": ("generator", network(channels=[-8])),
    "channels a text": ("generator", network(channels="8")),
    "layers 10^6": ("generator", network(layers_per_block=10**6)),
    "layers 16": ("missing or unknown|bytes hold", network(layers_per_block=16)),
    "patch 0": ("generator", network(patch=0)),
    "patch 10^9": ("generator", network(patch=10**9)),
    "groups 0": ("generator", network(norm_groups=0)),
    "heads 10^9": ("generator|network|unknown", network(attention_levels=[0], head_channels=10**9)),
    "components 10^12": ("bytes hold|missing or unknown", network(prediction="gaussian", components=10**12)),
    "rate infinite": ("generator", network(learning_rate=float("inf"))),
    "noise NaN": ("generator", network(noise_mean=float("nan"))),
    # its weights
    "weights empty": ("not safetensors|bytes hold", weights(lambda _: b"")),
    "weights cut": ("bytes, its card says", weights(lambda content: content[:-9], told=False)),
    "weights changed": ("SHA-256", weights(lambda content: content[:-1] + b"\x7f", told=False)),
    "weights with more behind": ("not safetensors", weights(lambda content: content + b"\0" * 8)),
    "weights garbage": ("not safetensors", weights(lambda content: b"\xff" * len(content))),
    "weights a pickle": ("not safetensors|bytes hold", weights(lambda content: b"\x80\x04" + content)),
    "header 10^18": ("not safetensors", weights(lambda content: struct.pack("<Q", 10**18) + content[8:])),
    "tensor missing": ("missing or unknown", tensors(lambda found: found.pop("scale"))),
    "tensor more": ("missing or unknown", tensors(lambda found: found.update(more=torch.zeros(1)))),
    "tensor of another shape": ("of shape", tensors(lambda found: found.update(scale=torch.zeros(3)))),
    "tensor of integers": ("of torch.int64", tensors(lambda found: found.update(scale=torch.tensor(1)))),
    "tensor complex": ("needed float16", tensors(lambda found: found.update(scale=torch.tensor(1j)))),
    "tensor NaN": ("not finite", tensors(lambda found: found["mean"].fill_(float("nan")))),
    "tensor infinite": ("not finite", tensors(lambda found: found["mean"].fill_(float("inf")))),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_it_is_refused_by_its_clients_name_and_nothing_of_it_is_kept(what: str, tmp_path: Path) -> None:
    reason, change = HOSTILE[what]
    change(write_module(tmp_path / "exchange", CLIENT, 0))
    write_module(tmp_path / "exchange", "south", 1)
    began = time.process_time()
    with pytest.raises(ModuleRefusedError, match=reason) as refusal:
        take(tmp_path / "exchange", tmp_path / "run")
    assert time.process_time() - began < 20
    assert refusal.value.client.startswith((CLIENT, "nörth", ".north", "nnn"))
    assert len(str(refusal.value)) < 1500
    assert not list((tmp_path / "run").glob(f"modules/{CLIENT}/*/*"))


def test_what_is_as_it_was_made_is_taken_and_what_is_not_finished_waits(tmp_path: Path) -> None:
    write_module(tmp_path / "exchange", CLIENT, 0)
    (tmp_path / "exchange/modules/north/class-001/checkpoints").mkdir(parents=True)
    (tmp_path / "exchange/modules/north/config.json").write_text("{}")
    (tmp_path / "exchange/modules/README").write_text("")
    assert [card.key for card in take(tmp_path / "exchange", tmp_path / "run")] == [("north", 0)]
    (tmp_path / "empty/modules/north/class-000").mkdir(parents=True)
    with pytest.raises(DataMissingError):
        take(tmp_path / "empty", tmp_path / "run")


@pytest.mark.parametrize("drawn", [np.zeros((2, 8, 8, 1)), np.full((2, 8, 8, 1), 255), None])
def test_a_module_that_draws_no_images_is_refused_with_its_first_unit(drawn: np.ndarray | None, tmp_path: Path) -> None:
    def draw(n: int, seed: int, attempts: dict[int, int]) -> np.ndarray:
        if drawn is None:
            raise FloatingPointError("images that it draws hold values that are not finite")
        return drawn.astype(np.uint8)

    actor = object.__new__(Synthesizer)
    actor.config = make_config(overrides=["--modules", "exchange"])
    actor.drawing = lambda key: SimpleNamespace(draw=draw)  # type: ignore[assignment, method-assign, return-value]
    with pytest.raises(ModuleRefusedError, match=r"'north', class 0.*(every pixel|not finite)"):
        actor.draw(Unit("north", 0, 0, 2, 1, "0" * 64))


FIELDS = ("format", "kind", *ModuleCard.__dataclass_fields__)


@fuzzed(300)
@given(st.dictionaries(st.sampled_from(FIELDS), json_values, min_size=1, max_size=3))
def test_a_card_of_any_values_is_read_or_refused(changes: dict[str, Any]) -> None:
    whole = ModuleCard("a", 0, 5, 1, 8, 10, "fp32", {}, 100, files={"model.safetensors": "0" * 64}).to_tree()
    try:
        with little_memory():
            found = ModuleCard.from_json(json.dumps(whole | changes).encode())
    except CardError:
        return
    assert found.n_images >= 0
    assert found.folder.startswith("modules/")


@fuzzed(300)
@given(st.binary(max_size=200))
def test_a_card_of_any_bytes_is_refused(content: bytes) -> None:
    with pytest.raises(CardError):
        ModuleCard.from_json(content)
