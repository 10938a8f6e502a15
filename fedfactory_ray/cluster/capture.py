"""Steps that a CUDA device replays: thousands of launches become one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP = 3
"""Calls that run as they are before the capture, while libraries set themselves up (torch's notes on CUDA graphs)."""


class Capture:
    """Calls of a step; on a CUDA device, after the first few, replays of its CUDA graph, with the same bytes.

    A small network's step is all launches: on an H100's host 31 ms of them for 2.6 ms of work.
    """

    def __init__(
        self, step: Callable[[], Tensor], device: torch.device, generators: Sequence[torch.Generator] = ()
    ) -> None:
        """`step` computes on `device`: it reads and changes tensors that stay where they are, waits for nothing, and
        draws from torch's global generator and from `generators`, on that device, alone."""
        self.step, self.device, self.generators = step, device, generators
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Tensor
        # Gradients and workspaces have to live with the stream that is captured.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self) -> Tensor:
        """One more step: its result, a tensor of its own."""
        if self.stream is None:
            return self.step()
        self.calls += 1
        if self.calls <= WARM_UP:
            current = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                result = self.step()
            current.wait_stream(self.stream)
            return result.clone()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            for generator in self.generators:
                self.graph.register_generator_state(generator)
            # Other threads may use the device meanwhile: they write checkpoints.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.result = self.step()
        self.graph.replay()
        return self.result.clone()
