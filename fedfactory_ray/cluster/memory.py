"""A GPU's memory: what training a network takes of it, counted without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from fedfactory_ray.cluster.devices import AUTOCAST_DTYPES
from fedfactory_ray.cluster.gpus import Need

STATE_BYTES = 5 * 4
"""Of a parameter: the weight, its average, its gradient and AdamW's two moments, in float32."""
TRANSIENT = 1.05
"""What the backward pass takes beside the saved activations. Measured on an H100: 23.8 GB where 21.4 are saved."""


def training_need(make: Callable[[], nn.Module], loss: Callable[[nn.Module, int], Tensor], precision: str) -> Need:
    """What training takes on a CUDA device, beside context and workspaces; `loss(network, n)` is that of n images.

    The network is built and run on tensors without content (FakeTensorMode), in `precision`; what autograd saves is
    counted, storages once. It is linear in the images, so two small batches tell of any.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.device("cuda"):
        network = make().train()
        few, more = (_saved_bytes(network, loss, n, precision) for n in (2, 4))
    per_image = (more - few) // 2
    state = STATE_BYTES * sum(parameter.numel() for parameter in network.parameters())
    return Need(state + few - 2 * per_image, int(TRANSIENT * per_image))


def _saved_bytes(network: nn.Module, loss: Callable[[nn.Module, int], Tensor], n: int, precision: str) -> int:
    own = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
    saved: dict[int, Tensor] = {}  # tensors, for a storage that is gone may lend its number to the next

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with _FusedAttention(), _autocast(precision), saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = loss(network, n)  # its graph has to live until all is counted
    del kept
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


class _FusedAttention(torch.overrides.TorchFunctionMode):
    """Attention by a kernel that saves no attention matrix, as GPUs do it; without one torch would choose another."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args[:3], None, True)[0]
        return function(*args, **(kwargs or {}))


@contextmanager
def _autocast(precision: str) -> Iterator[None]:
    """CUDA's autocast, also where there is no CUDA device: `torch.autocast` would then do nothing."""
    torch.set_autocast_dtype("cuda", AUTOCAST_DTYPES[precision])
    torch.set_autocast_enabled("cuda", precision != "fp32")
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
