"""What a federated method is: three formulas over flat parameter vectors. Everything else is shared.

Client i holds n_i images and the objective F_i; methods minimise F(x) = Σ_i p_i F_i(x) with p_i = n_i / Σ_j n_j. In a
round the server sends its weights x to the clients S; each takes K local steps y ← y - η_l · direction(…) from y = x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

Vectors = dict[str, Tensor]
"""Flat vectors by name, all of the length and dtype of the network's parameters."""
Gradient = Callable[[Tensor], Tensor]
"""Gradient of a client's loss on one batch, at the given weights."""


@dataclass(frozen=True)
class Update:
    """What a client uploads in a round; `n_images` is n_i."""

    n_images: int
    vectors: Vectors


@dataclass(frozen=True)
class Method:
    """Base of the methods, with FedAvg's formulas; a method overrides what it changes. Instances hold settings only.

    `server` holds the server's vectors, always `weights`; `received` what a client gets: `weights` and what `extras`
    adds; `state` what the client keeps from one of its rounds to its next.
    """

    client_lr: float = field(default=0.1, kw_only=True)
    """η_l: learning rate of the clients' SGD."""
    server_lr = 1.0

    def start_server(self, weights: Tensor) -> Vectors:
        """The server's vectors before the first round."""
        return {"weights": weights}

    def start_client(self, weights: Tensor) -> Vectors:
        """A client's vectors before its first round."""
        return {}

    def extras(self, server: Vectors) -> Vectors:
        """What the server sends to the clients of a round beside its weights."""
        return {}

    def direction(self, gradient: Tensor, weights: Tensor, received: Vectors, state: Vectors) -> Tensor:
        """What a local step descends along, given the batch's gradient at the local `weights`."""
        return gradient

    def finish(
        self, weights: Tensor, received: Vectors, state: Vectors, steps: int, learning_rate: float
    ) -> tuple[Vectors, Vectors]:
        """After `steps` local steps: the vectors to upload, and the client's new state."""
        return {"weights": weights}, state

    def aggregate(self, server: Vectors, updates: Sequence[Update], n_images: int) -> Vectors:
        """The server's vectors after a round; `n_images` is the number of all clients' images, Σ_j n_j."""
        step = weighted_mean(updates, "weights") - server["weights"]
        return server | {"weights": server["weights"] + self.server_lr * step}


def weighted_mean(updates: Sequence[Update], name: str) -> Tensor:
    """Σ_{i∈S} n_i v_i / Σ_{i∈S} n_i of the uploaded vectors `name`, summed in the order of `updates`."""
    return weighted_sum(updates, name, sum(update.n_images for update in updates))


def weighted_sum(updates: Sequence[Update], name: str, n_images: int) -> Tensor:
    """Σ_{i∈S} (n_i / `n_images`) v_i of the uploaded vectors `name`, summed in the order of `updates`."""
    first, *rest = updates
    total = first.vectors[name] * (first.n_images / n_images)
    for update in rest:
        total.add_(update.vectors[name], alpha=update.n_images / n_images)
    return total


def train_locally(
    method: Method, received: Vectors, state: Vectors, gradients: Iterable[Gradient], learning_rate: float
) -> tuple[Vectors, Vectors]:
    """One client's part of a round, a step for each of `gradients`; returns what it uploads and its new state."""
    weights, steps = received["weights"].clone(), 0
    for gradient in gradients:
        weights -= learning_rate * method.direction(gradient(weights), weights, received, state)
        steps += 1
    return method.finish(weights, received, state, steps, learning_rate)
