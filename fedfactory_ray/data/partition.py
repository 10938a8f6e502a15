"""Partitions: which training images each client holds, as indices with a SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from fedfactory_ray.data.source import Source
from fedfactory_ray.errors import PartitionError
from fedfactory_ray.seeds import random_state
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.data import PartitionConfig


@dataclass(frozen=True)
class Partition:
    """Indices into the training split (int64, ascending) by client and class; clients without images do not exist.

    `images_sha256` are the fingerprints of the images themselves, by client and class, where those are known.
    """

    classes: int
    shares: dict[str, dict[int, np.ndarray]]
    images_sha256: dict[tuple[str, int], str] = field(default_factory=dict)

    @property
    def clients(self) -> list[str]:
        """Names of the clients, in order."""
        return list(self.shares)

    def count(self, client: str, label: int) -> int:
        """Number of images of class `label` that `client` holds."""
        return len(self.shares[client].get(label, ()))

    def matrix(self) -> np.ndarray:
        """Image counts, int64 (clients, classes)."""
        return np.array([[self.count(c, y) for y in range(self.classes)] for c in self.clients], dtype=np.int64)

    def __iter__(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """Client, class and indices of every non-empty share, in order."""
        for client, share in self.shares.items():
            for label in sorted(share):
                yield client, label, share[label]

    def without(self, excluded: Sequence[str]) -> Partition:
        """The partition without these clients (`client-003`) and classes of clients (`client-003/7`); nobody else's
        share changes. Raises PartitionError for what nobody holds, and where nobody would be left."""
        shares = {client: dict(share) for client, share in self.shares.items()}
        for entry in excluded:
            client, _, label = entry.partition("/")
            if client not in self.shares or (label and int(label) not in self.shares[client]):
                held = ", ".join(map(str, sorted(self.shares.get(client, ()))))
                raise PartitionError(
                    f"partition.exclude has {entry}, "
                    + (f"client {client} holds classes {held}" if held else "unknown"),
                    f"clients of {', '.join(self.clients)}, or <client>/<class>",
                    "another entry in partition.exclude",
                )
            if label:
                del shares[client][int(label)]
            else:
                del shares[client]
        left = {client: share for client, share in shares.items() if share}
        if not left:
            raise PartitionError("partition.exclude leaves no client", "at least one", "fewer entries")
        return replace(self, shares=left)

    def offered(self, min_images: int) -> Partition:
        """The shares of at least `min_images` images, which train modules; a client without one is not in it."""
        large = {c: {y: i for y, i in share.items() if len(i) >= min_images} for c, share in self.shares.items()}
        return replace(self, shares={client: share for client, share in large.items() if share})

    def at_home(self, min_images: int) -> list[tuple[str, int, int]]:
        """Client, class and number of images of every share that is too small to train a module."""
        return [(client, label, len(indices)) for client, label, indices in self if len(indices) < min_images]

    @property
    def sha256(self) -> str:
        """Digest of names, classes and indices; independent of file format and platform."""
        digest = hashlib.sha256()
        for client, label, indices in self:
            digest.update(f"{client}\n{label}\n{len(indices)}\n".encode())
            digest.update(indices.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def content(self) -> list[Any]:
        """All that determines what is trained on this partition: who holds which images, and the images themselves."""
        return [self.sha256, [self.images_sha256.get((client, label)) for client, label, _ in self]]

    def to_table(self) -> pa.Table:
        """One row an image: client, label, index in the training split."""
        rows = list(self)
        return pa.table(
            {
                "client": np.repeat([client for client, _, _ in rows], [len(i) for _, _, i in rows]),
                "label": np.repeat(np.array([label for _, label, _ in rows], np.int32), [len(i) for _, _, i in rows]),
                "index": np.concatenate([indices for _, _, indices in rows]),
            }
        )

    @classmethod
    def from_table(cls, table: pa.Table, classes: int) -> Partition:
        """Inverse of `to_table`. Raises KeyError or TypeError for a table of other columns."""
        shares: dict[str, dict[int, np.ndarray]] = {}
        rows = table.select(["client", "label", "index"]).to_pandas()
        for (client, label), of_share in rows.groupby(["client", "label"], sort=False):
            shares.setdefault(client, {})[int(label)] = of_share["index"].to_numpy(np.int64)
        return cls(classes, shares)


def partition_summary(partition: Partition) -> dict[str, Any]:
    """A partition's digest and counts, as JSON values."""
    return {
        "sha256": partition.sha256,
        "clients": partition.clients,
        "counts": partition.matrix().tolist(),
    }


def make_partition(config: PartitionConfig, labels: np.ndarray, classes: int, seed: int) -> Partition:
    """Deal the training images to clients.

    Args:
        config: The scheme and its numbers.
        labels: Training labels, int (n,), in [0, classes).
        classes: Number of classes.
        seed: The run's seed.

    Raises PartitionError where the labels at hand do not allow the scheme.
    """
    draw = random_state(seed, "partition")
    pools = [draw.permutation(np.flatnonzero(labels == y)) for y in range(classes)]
    clients = len(config.counts) or config.clients or classes
    sizes = SCHEMES[config.scheme](config, np.array([len(pool) for pool in pools]), clients, draw)
    shares: dict[str, dict[int, np.ndarray]] = {}
    starts = np.zeros(classes, dtype=np.int64)
    digits = max(3, len(str(len(sizes) - 1)))  # so that the names' order is the clients'
    for k, row in enumerate(sizes):
        share = {
            y: np.sort(pools[y][starts[y] : starts[y] + n]).astype(np.int64) for y, n in enumerate(row.tolist()) if n
        }
        starts += row
        if share:
            shares[f"client-{k:0{digits}d}"] = share
    return Partition(classes, shares)


def _even(total: int, parts: int) -> np.ndarray:
    """`total` in `parts` whole numbers that differ by one at most."""
    return np.diff(np.arange(parts + 1) * total // parts)


def _deal_classes(holders: list[list[int]], pool_sizes: np.ndarray, min_size: int) -> np.ndarray:
    """Sizes where class y is shared evenly by the clients `holders[y]`."""
    clients = 1 + max(client for group in holders for client in group)
    sizes = np.zeros((clients, len(pool_sizes)), dtype=np.int64)
    for y, group in enumerate(holders):
        sizes[group, y] = _even(int(pool_sizes[y]), len(group))
    smallest = int(sizes.sum(1).min())
    if smallest < min_size:
        raise PartitionError(
            f"a client would hold {smallest} images",
            f"min_size={min_size}",
            "fewer partition.clients or a smaller partition.min_size",
        )
    return sizes


def silos(config: PartitionConfig, pool_sizes: np.ndarray, clients: int, draw: np.random.RandomState) -> np.ndarray:
    """One class a client: client k holds class k mod C; clients of one class share it evenly."""
    classes = len(pool_sizes)
    if clients < classes:
        raise PartitionError(
            f"{clients} clients of one class each for {classes} classes",
            "at least one client a class",
            f"partition.clients={classes}, or partition.scheme=pathological",
        )
    return _deal_classes([list(range(y, clients, classes)) for y in range(classes)], pool_sizes, config.min_size)


def pathological(
    config: PartitionConfig, pool_sizes: np.ndarray, clients: int, draw: np.random.RandomState
) -> np.ndarray:
    """k classes a client (McMahan et al. 2017, sec. 3), every class held by someone: client i holds the k classes
    that follow position i·k of repeated random orders of all classes."""
    classes, k = len(pool_sizes), config.classes_per_client
    if k > classes:
        raise PartitionError(
            f"classes_per_client={k}",
            f"at most the {classes} classes there are",
            f"partition.classes_per_client={classes}",
        )
    if clients * k < classes:
        raise PartitionError(
            f"{clients} clients of {k} classes each for {classes} classes",
            f"at least {classes} places",
            f"partition.clients={-(-classes // k)}",
        )
    order = draw.permutation(classes)
    holders: list[list[int]] = [[] for _ in range(classes)]
    for place in range(clients * k):
        holders[order[place % classes]].append(place // k)
    return _deal_classes(holders, pool_sizes, config.min_size)


def dirichlet(config: PartitionConfig, pool_sizes: np.ndarray, clients: int, draw: np.random.RandomState) -> np.ndarray:
    """Each class is shared in proportions drawn from Dirichlet(alpha) (Hsu et al. 2019), drawn anew until every
    client holds min_size images."""
    if clients * config.min_size > pool_sizes.sum():
        raise PartitionError(
            f"{int(pool_sizes.sum())} images for {clients} clients",
            f"min_size={config.min_size} each",
            "fewer partition.clients",
        )
    for _ in range(1000):
        with np.errstate(invalid="ignore", divide="ignore"):
            proportions = draw.dirichlet(np.full(clients, config.alpha), size=len(pool_sizes))
        if not np.isfinite(proportions).all():  # with a tiny alpha all of a class's shares may underflow
            continue
        edges = np.floor(np.cumsum(proportions, axis=1) * pool_sizes[:, None] + 0.5).astype(np.int64)
        edges[:, -1] = pool_sizes
        sizes = np.diff(edges, prepend=0).T
        if sizes.sum(1).min() >= config.min_size:
            return sizes
    raise PartitionError(
        f"no draw of 1000 from Dirichlet({config.alpha}) gave each of {clients} clients {config.min_size} images",
        f"min_size={config.min_size}",
        "a larger partition.alpha, fewer partition.clients, or a smaller partition.min_size",
    )


def iid(config: PartitionConfig, pool_sizes: np.ndarray, clients: int, draw: np.random.RandomState) -> np.ndarray:
    """All images shuffled and dealt evenly (McMahan et al. 2017, sec. 3), so that every client's are drawn alike: a
    client may lack a class of which there are hardly more images than clients."""
    total = int(pool_sizes.sum())
    if total // clients < config.min_size:
        raise PartitionError(
            f"{total} images for {clients} clients",
            f"min_size={config.min_size} each",
            "fewer partition.clients or a smaller partition.min_size",
        )
    shuffled = draw.permutation(np.repeat(np.arange(len(pool_sizes)), pool_sizes))
    parts = np.split(shuffled, np.cumsum(_even(total, clients))[:-1])
    return np.array([np.bincount(part, minlength=len(pool_sizes)) for part in parts])


def skew(config: PartitionConfig, pool_sizes: np.ndarray, clients: int, draw: np.random.RandomState) -> np.ndarray:
    """The explicit counts of the configuration; images beyond them stay unused."""
    sizes = np.array(config.counts, dtype=np.int64)
    if sizes.shape[1] != len(pool_sizes):
        raise PartitionError(
            f"counts with {sizes.shape[1]} columns",
            f"{len(pool_sizes)}, one a class",
            "a column for every class",
        )
    wanted = sizes.sum(0)
    for y in np.flatnonzero(wanted > pool_sizes):
        raise PartitionError(
            f"counts ask for {wanted[y]} images of class {y}",
            f"at most the {pool_sizes[y]} there are",
            "smaller counts",
        )
    if sizes.sum(1).min() < config.min_size:
        raise PartitionError(
            f"a client with {sizes.sum(1).min()} images",
            f"min_size={config.min_size}",
            "a smaller partition.min_size",
        )
    return sizes


SCHEMES = {"silos": silos, "pathological": pathological, "dirichlet": dirichlet, "iid": iid, "skew": skew}


def own_indices(config: Config, source: Source, label: int, places: np.ndarray) -> np.ndarray:
    """Indices into the client's training split of its images of a class, int64 (n,).

    A natural silo's places count among its own images of the class, for no other node has seen its labels.
    """
    if config.partition.scheme != "natural":
        return places
    return np.flatnonzero(source.labels("train") == label)[places]


def held_elsewhere(counts: dict[tuple[str, int], int], classes: int) -> Partition:
    """A partition of images that only their clients can index: it holds places among a client's own of each class."""
    shares: dict[str, dict[int, np.ndarray]] = {}
    for (client, label), n in sorted(counts.items()):
        shares.setdefault(client, {})[label] = np.arange(n)
    return Partition(classes, shares)


def still_held(partition: Partition, excluded: Sequence[str]) -> list[str]:
    """Entries of `partition.exclude` that the partition holds: a forgotten client may have taken its images away."""
    held = {*partition.clients, *(f"{client}/{label}" for client, label, _ in partition)}
    return [entry for entry in excluded if entry in held]
