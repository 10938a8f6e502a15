import hashlib
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfactory_ray.data.partition import Partition, held_elsewhere, make_partition, still_held
from fedfactory_ray.errors import PartitionError
from fedfactory_ray.settings.data import PartitionConfig


def labels_of(counts: list[int]) -> np.ndarray:
    return np.random.RandomState(0).permutation(np.repeat(np.arange(len(counts)), counts))


def check_disjoint_and_true(partition: Partition, labels: np.ndarray) -> np.ndarray:
    indices = np.concatenate([share for _, _, share in partition])
    assert len(np.unique(indices)) == len(indices)
    for _, label, share in partition:
        assert (labels[share] == label).all()
        assert (np.diff(share) > 0).all()
    return np.sort(indices)


counts = st.lists(st.integers(30, 120), min_size=2, max_size=6)


@settings(max_examples=40, deadline=None)
@given(counts, st.integers(1, 3), st.integers(0, 5))
def test_silos_hold_one_class_each_and_all_images(counts: list[int], per_class: int, seed: int) -> None:
    labels = labels_of(counts)
    config = PartitionConfig(scheme="silos", clients=per_class * len(counts))
    partition = make_partition(config, labels, len(counts), seed)
    assert (check_disjoint_and_true(partition, labels) == np.arange(len(labels))).all()
    matrix = partition.matrix()
    assert ((matrix > 0).sum(1) == 1).all()
    assert matrix.max(0).max() - matrix.max(0).min() <= max(counts) - min(counts)


@settings(max_examples=40, deadline=None)
@given(counts, st.integers(1, 3), st.integers(0, 4), st.integers(0, 5))
def test_pathological_clients_hold_k_classes(counts: list[int], k: int, more: int, seed: int) -> None:
    k = min(k, len(counts))
    labels = labels_of(counts)
    config = PartitionConfig(
        scheme="pathological", classes_per_client=k, clients=-(-len(counts) // k) + more, min_size=1
    )
    partition = make_partition(config, labels, len(counts), seed)
    assert (check_disjoint_and_true(partition, labels) == np.arange(len(labels))).all()
    assert ((partition.matrix() > 0).sum(1) == k).all()


@settings(max_examples=40, deadline=None)
@given(counts, st.integers(2, 5), st.floats(0.05, 10), st.integers(0, 5))
def test_dirichlet_keeps_the_minimum_and_loses_nothing(
    counts: list[int], clients: int, alpha: float, seed: int
) -> None:
    labels = labels_of(counts)
    config = PartitionConfig(scheme="dirichlet", clients=clients, alpha=alpha, min_size=3)
    try:
        partition = make_partition(config, labels, len(counts), seed)
    except PartitionError as refusal:
        assert "larger partition.alpha" in str(refusal)
        return
    assert (check_disjoint_and_true(partition, labels) == np.arange(len(labels))).all()
    assert partition.matrix().sum(1).min() >= 3


def test_skew_deals_exactly_the_counts() -> None:
    labels = labels_of([50, 60])
    config = PartitionConfig(scheme="skew", counts=((10, 20), (30, 0)))
    partition = make_partition(config, labels, 2, 0)
    check_disjoint_and_true(partition, labels)
    assert partition.matrix().tolist() == [[10, 20], [30, 0]]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PartitionConfig(clients=2), "2 clients of one class each for 3 classes"),
        (PartitionConfig(clients=30), "min_size=10"),
        (PartitionConfig(scheme="pathological", classes_per_client=4), "at most the 3 classes"),
        (PartitionConfig(scheme="pathological", classes_per_client=1, clients=2), "at least 3 places"),
        (PartitionConfig(scheme="dirichlet", clients=20), "60 images for 20 clients"),
        (PartitionConfig(scheme="skew", counts=((10, 10),)), "2 columns"),
        (PartitionConfig(scheme="skew", counts=((30, 10, 10),)), "30 images of class 0"),
    ],
)
def test_impossible_partitions_are_refused(config: PartitionConfig, expected: str) -> None:
    with pytest.raises(PartitionError, match=expected):
        make_partition(config, labels_of([20, 20, 20]), 3, 0)


def test_digest_is_the_same_in_another_process_and_tells_seeds_apart() -> None:
    program = (
        "import numpy as np\n"
        "from fedfactory_ray.settings.data import PartitionConfig\n"
        "from fedfactory_ray.data.partition import make_partition\n"
        "labels = np.arange(300) % 5\n"
        "print(make_partition(PartitionConfig(scheme='dirichlet', alpha=0.3), labels, 5, {seed}).sha256)"
    )

    def digest(seed: int, hash_seed: str) -> str:
        code = program.format(seed=seed)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": hash_seed}
        )
        return done.stdout.strip()

    assert digest(0, "1") == digest(0, "2") != digest(1, "1")
    # Recorded when the format was fixed: a change of this value changes every run.
    assert digest(0, "1")[:16] == "72b23a5c85e7c3a0"


def test_digest_depends_on_content_alone() -> None:
    shares = {"a": {1: np.array([3, 5])}, "b": {0: np.array([0])}}
    expected = hashlib.sha256(
        b"a\n1\n2\n" + np.array([3, 5], "<i8").tobytes() + b"b\n0\n1\n" + np.array([0], "<i8").tobytes()
    ).hexdigest()
    partition = Partition(2, shares)
    assert partition.sha256 == expected
    table = partition.to_table().to_pydict()
    assert table == {"client": ["a", "a", "b"], "label": [1, 1, 0], "index": [3, 5, 0]}


def test_excluding_leaves_the_others_as_they_were() -> None:
    whole = make_partition(PartitionConfig(scheme="dirichlet", clients=6, alpha=0.5), labels_of([60] * 4), 4, 3)
    labels = sorted(whole.shares["client-002"])
    left = whole.without(("client-001", f"client-002/{labels[0]}"))
    assert left.clients == [client for client in whole.clients if client != "client-001"]
    for client, label, indices in left:
        np.testing.assert_array_equal(indices, whole.shares[client][label])
    assert sorted(left.shares["client-002"]) == labels[1:]
    assert len(list(left)) == len(list(whole)) - len(whole.shares["client-001"]) - 1
    assert left.sha256 != whole.sha256
    assert whole.without(()).sha256 == whole.sha256
    every_class = [f"client-002/{label}" for label in labels]
    assert whole.without(every_class).sha256 == whole.without(("client-002",)).sha256


@pytest.mark.parametrize(
    ("excluded", "reason"),
    [
        (("client-007",), "partition.exclude has client-007, unknown"),
        (("client-000/1",), "client-000/1, client client-000 holds classes 0"),
        (("client-000", "client-001"), "leaves no client"),
    ],
)
def test_excluding_whom_nobody_knows_or_everybody_is_refused(excluded: tuple[str, ...], reason: str) -> None:
    partition = make_partition(PartitionConfig(), labels_of([20, 20]), 2, 0)
    with pytest.raises(PartitionError, match=reason):
        partition.without(excluded)


def test_the_order_of_exclusion_does_not_matter_and_a_client_covers_its_classes() -> None:
    one = PartitionConfig(exclude=("client-002", "client-001/3", "client-001", "client-000/1"))
    assert one.exclude == ("client-000/1", "client-001", "client-002")
    assert one == PartitionConfig(exclude=("client-001", "client-000/1", "client-002"))


def test_who_was_forgotten_may_have_taken_the_images_away() -> None:
    counts = {("north", 0): 3, ("north", 1): 2, ("south", 1): 4}
    partition = held_elsewhere(counts, 2)
    assert still_held(partition, ["north/0", "south", "west", "south/0"]) == ["north/0", "south"]


@settings(max_examples=40, deadline=None)
@given(counts, st.integers(1, 40), st.integers(0, 5))
def test_iid_clients_hold_the_same_number_and_all_images(counts: list[int], clients: int, seed: int) -> None:
    labels = labels_of(counts)
    config = PartitionConfig(scheme="iid", clients=clients, min_size=1)
    partition = make_partition(config, labels, len(counts), seed)
    assert (check_disjoint_and_true(partition, labels) == np.arange(len(labels))).all()
    sizes = partition.matrix().sum(1)
    assert len(sizes) == clients
    assert sizes.max() - sizes.min() <= 1


def test_iid_clients_can_outnumber_a_class_and_hold_each_in_its_share() -> None:
    labels = labels_of([60, 600])
    matrix = make_partition(PartitionConfig(scheme="iid", clients=66), labels, 2, 0).matrix()
    assert matrix.shape == (66, 2)
    assert set(matrix[:, 0]) > {0, 1, 2}  # drawn, not dealt one each
    few = make_partition(PartitionConfig(scheme="iid", clients=3), labels, 2, 0).matrix()
    assert (np.abs(few[:, 0] - 20) < 12).all()
    with pytest.raises(PartitionError, match="660 images for 100 clients"):
        make_partition(PartitionConfig(scheme="iid", clients=100), labels, 2, 0)


def test_an_alpha_so_small_that_shares_underflow_is_refused_without_a_warning() -> None:
    labels = labels_of([60] * 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for clients in (2, 4):
            config = PartitionConfig(scheme="dirichlet", clients=clients, alpha=1e-5)
            with pytest.raises(PartitionError, match=r"Dirichlet\(1e-05\)[\s\S]*larger partition.alpha"):
                make_partition(config, labels, 4, 0)
        config = PartitionConfig(scheme="dirichlet", clients=2, alpha=1e-3)
        matrix = make_partition(config, labels, 4, 0).matrix()
    assert (matrix >= 0).all()
    assert (matrix.sum(0) == 60).all()


def test_the_order_of_names_is_that_of_the_clients_beyond_a_thousand() -> None:
    labels = np.arange(4 * 1200) % 4
    partition = make_partition(PartitionConfig(scheme="iid", clients=1200, min_size=1), labels, 4, 0)
    assert partition.clients == sorted(partition.clients)
    assert (partition.clients[0], partition.clients[-1]) == ("client-0000", "client-1199")
    thousand = make_partition(PartitionConfig(scheme="iid", clients=1000, min_size=1), labels, 4, 0)
    assert thousand.clients[-1] == "client-999"
