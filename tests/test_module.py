import io
import json
import pickle
import struct
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedfactory_ray.errors import ModuleRefusedError
from fedfactory_ray.generation.card import ModuleCard, module_fingerprint
from fedfactory_ray.generation.module import digest, load_weights, make_denoiser, pack
from fedfactory_ray.generation.unet import Denoiser
from fedfactory_ray.settings.sections import GeneratorConfig

CONFIG = GeneratorConfig(channels=(8, 16), prediction="gaussian", components=6)


def random_denoiser(seed: int = 0) -> Denoiser:
    """Every parameter and buffer random and in half precision's range."""
    torch.manual_seed(seed)
    denoiser = Denoiser(CONFIG, 1, 8)
    for tensor in denoiser.state_dict().values():
        tensor.copy_(torch.rand_like(tensor) + 0.1)
    return denoiser


def card_of(weights: bytes, config: GeneratorConfig = CONFIG) -> ModuleCard:
    settings, files = config.model_dump(mode="json"), {"model.safetensors": digest(weights)}
    return ModuleCard("client-007", 3, 40, 1, 8, 30, "fp32", settings, len(weights), files=files)


@pytest.fixture(scope="module")
def weights() -> bytes:
    return pack(random_denoiser(), half=False)


def refusal(weights: bytes, card: ModuleCard | None = None) -> str:
    """What weights are refused with; the network has to stay as it was."""
    card = card or card_of(weights)
    denoiser = make_denoiser(card)
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    with pytest.raises(ModuleRefusedError, match="client-007") as error:
        load_weights(denoiser, weights, card)
    assert error.value.client == "client-007"
    assert "class 3" in str(error.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in denoiser.state_dict().items())
    return str(error.value)


def changed(weights: bytes, name: str, tensor: Tensor | None) -> bytes:
    tensors = safetensors.torch.load(weights)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    return safetensors.torch.save(tensors)


def test_full_precision_round_trip_is_exact(weights: bytes) -> None:
    source, target = random_denoiser(), make_denoiser(card_of(weights))
    load_weights(target, weights, card_of(weights))
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor)
    assert not target.training
    assert pack(target, half=False) == weights


def test_half_precision_round_trip_rounds_matrices_and_keeps_vectors() -> None:
    source = random_denoiser()
    packed = pack(source, half=True)
    target = make_denoiser(card_of(packed))
    load_weights(target, packed, card_of(packed))
    for name, tensor in source.state_dict().items():
        expected = tensor.half().float() if tensor.ndim > 1 else tensor
        assert torch.equal(target.state_dict()[name], expected)
        assert target.state_dict()[name].dtype == torch.float32
    assert pack(target, half=True) == packed


def test_half_precision_halves_the_upload(weights: bytes) -> None:
    assert len(pack(random_denoiser(), half=True)) < 0.65 * len(weights)


def test_packing_equal_weights_gives_equal_bytes(weights: bytes) -> None:
    assert pack(random_denoiser(), half=False) == weights
    assert digest(pack(random_denoiser(1), half=False)) != digest(weights)


def test_a_loaded_module_denoises_as_the_trained_one(weights: bytes) -> None:
    source, target = random_denoiser().eval(), make_denoiser(card_of(weights))
    load_weights(target, weights, card_of(weights))
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 3.0])
    assert torch.equal(source(x, sigma), target(x, sigma))


def test_another_digest_is_refused(weights: bytes) -> None:
    assert "SHA-256" in refusal(weights, replace(card_of(weights), files={"model.safetensors": "0" * 64}))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**9))
def test_a_single_changed_byte_is_refused(place: int) -> None:
    packed = bytearray(pack(random_denoiser(), half=True))
    card = card_of(bytes(packed))
    packed[place % len(packed)] ^= 1
    assert "SHA-256" in refusal(bytes(packed), card)


# From here on the digest is right: the client itself uploads something wrong.


def test_a_missing_tensor_is_refused_by_name(weights: bytes) -> None:
    message = refusal(changed(weights, "unet.conv_in.weight", None))
    assert "unet.conv_in.weight" in message
    assert "1 in all" in message


def test_an_unknown_tensor_is_refused_by_name(weights: bytes) -> None:
    assert "stowaway" in refusal(changed(weights, "stowaway", torch.zeros(2)))


def test_another_architecture_is_refused(weights: bytes) -> None:
    config = GeneratorConfig(channels=(8, 16, 16), prediction="gaussian", components=6)
    assert "missing or unknown" in refusal(weights, card_of(weights, config))
    wider = GeneratorConfig(channels=(8, 24), prediction="gaussian", components=6)
    assert "of shape" in refusal(weights, card_of(weights, wider))


@pytest.mark.parametrize("shape", [(64,), (1, 8, 9), (8, 8), (0,), (2, 1, 8, 8)])
def test_a_wrong_shape_is_refused_with_both(weights: bytes, shape: tuple[int, ...]) -> None:
    message = refusal(changed(weights, "mean", torch.zeros(shape)))
    assert "tensor mean" in message
    assert str(shape) in message
    assert "(1, 8, 8)" in message


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int32, torch.int64, torch.bool, torch.bfloat16, torch.uint8, torch.float8_e4m3fn]
)
def test_a_wrong_dtype_is_refused_by_name(weights: bytes, dtype: torch.dtype) -> None:
    message = refusal(changed(weights, "scale", torch.ones(()).to(dtype)))
    assert str(dtype) in message
    assert "tensor scale" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_values_that_are_not_finite_are_refused(weights: bytes, value: float, dtype: torch.dtype) -> None:
    tensor = torch.zeros(1, 8, 8, dtype=dtype)
    tensor[0, 7, 7] = value
    message = refusal(changed(weights, "mean", tensor))
    assert "tensor mean" in message
    assert "not finite" in message


class Exploit:
    """Unpickling this would tell."""

    triggered = False

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return setattr, (Exploit, "triggered", True)


def test_a_pickle_is_refused_and_never_run() -> None:
    assert "not safetensors" in refusal(pickle.dumps(Exploit()))
    stream = io.BytesIO()
    torch.save({"mean": Exploit()}, stream)
    assert "not safetensors" in refusal(stream.getvalue())
    assert not Exploit.triggered


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 200, 0.5, 0.999])
def test_truncated_weights_are_refused(weights: bytes, kept: float) -> None:
    n = int(kept * len(weights)) if isinstance(kept, float) else kept
    assert "not safetensors" in refusal(weights[:n])


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused(content: bytes) -> None:
    assert refusal(content)


def raw_safetensors(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]},
        {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]},
        {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": "U16", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1, 0], "data_offsets": [0, 0]},
    ],
    ids=lambda entry: f"{entry['dtype']}-{entry['shape']}-{entry['data_offsets']}",
)
def test_malicious_headers_are_refused(entry: dict[str, object]) -> None:
    end = max(entry["data_offsets"])  # type: ignore[call-overload]
    assert refusal(raw_safetensors({"mean": entry}, bytes(end)))


@pytest.mark.parametrize(
    "header", [b"", b"{", b"[]", b"\xff\xfe", b"{}", b'{"mean": 3}', b'{"__metadata__": {"a": "b"}}']
)
def test_senseless_headers_are_refused(header: bytes) -> None:
    assert refusal(raw_safetensors(header, b""))


# The card


def test_the_card_survives_json(weights: bytes) -> None:
    card = card_of(weights)
    again = ModuleCard.from_json(card.to_json())
    assert again == card
    assert again.to_json() == card.to_json()
    assert GeneratorConfig(**again.generator) == CONFIG


def test_the_card_names_its_place(weights: bytes) -> None:
    card = card_of(weights)
    assert card.key == ("client-007", 3)
    assert card.folder == "modules/client-007/class-003"


def test_the_fingerprint_covers_all_that_determines_a_module() -> None:
    def made_of(generator: GeneratorConfig = CONFIG, **changes: Any) -> str:
        facts = {"precision": "fp32", "threads": 1, "seed": 7, "images_sha256": "beef"}
        return module_fingerprint(generator, **(facts | changes))

    # What `auto` came to counts, not that it was `auto`.
    assert made_of() == made_of(CONFIG.model_copy(update={"precision": "fp32"}))
    others = [{"precision": "bf16"}, {"threads": 2}, {"seed": 8}, {"images_sha256": "f00d"}]
    found = [made_of(), made_of(CONFIG.model_copy(update={"min_steps": 9})), *(made_of(**change) for change in others)]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("half", "value", "told"),
    [(True, 65_520.0, "65520, in the upload at most 65504"), (False, float("inf"), "inf, in the upload")],
)
def test_a_weight_that_the_upload_has_no_number_for_is_refused(half: bool, value: float, told: str) -> None:
    denoiser = random_denoiser()
    denoiser.unet.conv_out.weight.data[0, 0, 0, 0] = -value
    with pytest.raises(FloatingPointError, match=f"unet.conv_out.weight reaches {told}"):
        pack(denoiser, half=half)
    denoiser.unet.conv_out.weight.data[0, 0, 0, 0] = 65_504.0
    pack(denoiser, half=half)
