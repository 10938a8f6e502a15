"""A module's weights: packed as safetensors, verified before they are used."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fedfactory_ray.errors import ModuleRefusedError
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.generation.unet import Denoiser
from fedfactory_ray.settings.sections import GeneratorConfig


def pack(network: nn.Module, *, half: bool) -> bytes:
    """Weights as safetensors; with `half`, matrices and filters as float16 (vectors and scalars stay float32).

    Raises FloatingPointError for weights that are not finite, or that float16 has no number for.
    """
    tensors = {
        name: tensor.detach().cpu().to(torch.float16 if half and tensor.ndim > 1 else torch.float32).contiguous()
        for name, tensor in network.state_dict().items()
    }
    for name, tensor in network.state_dict().items():
        if not torch.isfinite(tensors[name]).all():
            most = float(tensor.abs().max())
            raise FloatingPointError(
                f"weight {name} reaches {most:g}, in the upload at most {torch.finfo(tensors[name].dtype).max:g} can "
                "stand: lower generator.learning_rate, or generator.half_precision_upload=false"
            )
    return safetensors.torch.save(tensors)


def digest(weights: bytes) -> str:
    """SHA-256 of a module's weights, in hexadecimal."""
    return hashlib.sha256(weights).hexdigest()


def make_denoiser(card: ModuleCard) -> Denoiser:
    """An untrained network of the card's architecture."""
    return Denoiser(GeneratorConfig(**card.generator), card.channels, card.resolution)


def make_blueprint(card: ModuleCard) -> dict[str, Tensor]:
    """Names and shapes of the card's network, on torch's meta device: nothing is allocated. Raises ModuleRefusedError
    where it cannot be built, or has more numbers than the card's file can hold."""
    try:
        with torch.device("meta"):
            expected = make_denoiser(card).state_dict()
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, AssertionError) as error:
        raise ModuleRefusedError(card.client, card.label, f"its network cannot be built ({error})"[:300]) from error
    numbers = sum(tensor.numel() for tensor in expected.values())
    if 2 * numbers > card.size:
        found = f"a network of {numbers} numbers, of which {card.size} bytes hold {card.size // 2} at most"
        raise ModuleRefusedError(card.client, card.label, found)
    return expected


def verified(weights: bytes, card: ModuleCard, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's tensors, by name, for a network of the tensors `expected`.

    Raises ModuleRefusedError, which names the client, unless digest, tensor names, shapes, dtypes and values are right.
    """

    def refuse(reason: str) -> ModuleRefusedError:
        return ModuleRefusedError(card.client, card.label, reason)

    refuse_other_bytes(weights, card)
    try:
        found: dict[str, Tensor] = safetensors.torch.load(weights)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise refuse(f"not safetensors ({error})"[:300]) from error
    if found.keys() != expected.keys():
        strange = sorted(found.keys() ^ expected.keys())
        raise refuse(f"tensors {strange[:3]!r:.200} missing or unknown ({len(strange)} in all)")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise refuse(f"tensor {name} of shape {tuple(tensor.shape)}, needed {tuple(expected[name].shape)}")
        if tensor.dtype not in (torch.float16, torch.float32):
            raise refuse(f"tensor {name} of {tensor.dtype}, needed float16 or float32")
        if not torch.isfinite(tensor).all():
            raise refuse(f"tensor {name} holds values that are not finite")
    return found


def refuse_other_bytes(weights: bytes, card: ModuleCard) -> None:
    """Raise ModuleRefusedError for weights of another SHA-256 than their card's."""
    if digest(weights) != card.sha256:
        told = f"SHA-256 {digest(weights)[:12]}…, its card says {card.sha256[:12]}…"
        raise ModuleRefusedError(card.client, card.label, told)


def load_weights(denoiser: Denoiser, weights: bytes, card: ModuleCard) -> None:
    """Verify a module and put its weights into `denoiser`. Raises ModuleRefusedError, see `verified`."""
    denoiser.load_state_dict(verified(weights, card, denoiser.state_dict()))
    denoiser.eval()
