"""The federated methods where the answer is known: strongly convex problems with heterogeneous clients, in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedfactory_ray.baselines.fedavg import FedAvg
from fedfactory_ray.baselines.feddyn import FedDyn
from fedfactory_ray.baselines.fedprox import FedProx
from fedfactory_ray.baselines.interface import Method, Update, train_locally, weighted_mean, weighted_sum
from fedfactory_ray.baselines.scaffold import Scaffold
from fedfactory_ray.settings.sections import FederatedConfig

STEPS, RATE = 10, 0.05


@dataclass
class Client:
    n_images: int
    gradient: Callable[[Tensor], Tensor]


@dataclass
class Problem:
    """Clients, the minimum of Σ_i n_i F_i, and where to start."""

    clients: list[Client]
    optimum: Tensor
    start: Tensor


def quadratics(seed: int = 0, clients: int = 5, size: int = 4) -> Problem:
    """F_i(x) = ½ (x - b_i)ᵀ A_i (x - b_i), with eigenvalues of A_i in [0.5, 3]; unequal image counts."""
    draw = torch.Generator().manual_seed(seed)
    found, hessian, pull = [], torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for i in range(clients):
        basis, _ = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))
        a = basis @ torch.diag(0.5 + 2.5 * torch.rand(size, generator=draw, dtype=torch.float64)) @ basis.T
        b = 3 * torch.randn(size, generator=draw, dtype=torch.float64)
        found.append(Client(10 * (i + 1), lambda x, a=a, b=b: a @ (x - b)))
        hessian, pull = hessian + found[-1].n_images * a, pull + found[-1].n_images * a @ b
    return Problem(found, torch.linalg.solve(hessian, pull), torch.zeros(size, dtype=torch.float64))


def logistic(clients: int = 4, size: int = 3, ridge: float = 0.1) -> Problem:
    """Ridge-regularised logistic regression; client i's labels are skewed and its inputs shifted."""
    draw = torch.Generator().manual_seed(1)
    found, sets = [], []
    for i in range(clients):
        n = 20 * (i + 1)
        x = torch.randn(n, size, generator=draw, dtype=torch.float64) + (i - 1.5)
        y = (torch.rand(n, generator=draw) < (0.95 if i % 2 else 0.05)).double()
        sets.append((x, y))
        found.append(Client(n, lambda w, x=x, y=y: x.T @ (torch.sigmoid(x @ w) - y) / len(y) + ridge * w))
    x, y = (torch.cat(parts) for parts in zip(*sets, strict=True))
    optimum = torch.zeros(size, dtype=torch.float64)
    for _ in range(50):  # Newton's method
        p = torch.sigmoid(x @ optimum)
        hessian = (x * (p * (1 - p))[:, None]).T @ x / len(y) + ridge * torch.eye(size, dtype=torch.float64)
        optimum = optimum - torch.linalg.solve(hessian, x.T @ (p - y) / len(y) + ridge * optimum)
    return Problem(found, optimum, torch.zeros(size, dtype=torch.float64))


def run(
    method: Method, problem: Problem, rounds: int, *, steps: int = STEPS, rate: float = RATE, take: int | None = None
) -> Tensor:
    """The server's weights after `rounds`; `take` clients, drawn anew, play in each."""
    draw = torch.Generator().manual_seed(2)
    server = method.start_server(problem.start)
    states = [method.start_client(problem.start) for _ in problem.clients]
    images = sum(client.n_images for client in problem.clients)
    for _ in range(rounds):
        chosen = torch.randperm(len(problem.clients), generator=draw)[:take].sort().values.tolist()
        received = {"weights": server["weights"]} | method.extras(server)
        updates = []
        for i in chosen:
            client = problem.clients[i]
            vectors, states[i] = train_locally(method, received, states[i], [client.gradient] * steps, rate)
            updates.append(Update(client.n_images, vectors))
        server = method.aggregate(server, updates, images)
    return server["weights"]


def distance(weights: Tensor, problem: Problem) -> float:
    return float((weights - problem.optimum).norm() / (problem.start - problem.optimum).norm())


PROBLEMS = pytest.mark.parametrize("make", [quadratics, logistic])


@PROBLEMS
@pytest.mark.parametrize("method", [Scaffold(), FedDyn(alpha=1.0)], ids=lambda m: type(m).__name__)
def test_scaffold_and_feddyn_converge_to_the_global_optimum_where_fedavg_does_not(
    make: Callable[[], Problem], method: Method
) -> None:
    problem = make()
    assert distance(run(method, problem, 400), problem) < 1e-9
    drifted = [distance(run(FedAvg(), problem, rounds), problem) for rounds in (300, 400)]
    assert drifted[0] == pytest.approx(drifted[1], rel=1e-6)  # it has converged,
    assert drifted[0] > 1e-2  # elsewhere


@PROBLEMS
@pytest.mark.parametrize("method", [Scaffold(), FedDyn(alpha=3.0)], ids=lambda m: type(m).__name__)
def test_they_do_so_when_only_some_clients_take_part(make: Callable[[], Problem], method: Method) -> None:
    problem = make()
    assert distance(run(method, problem, 1500, take=2), problem) < 1e-6


@pytest.mark.parametrize("take", [1, 3, None])
def test_server_vectors_are_the_weighted_means_of_the_clients_whoever_takes_part(take: int | None) -> None:
    problem = quadratics()
    total = sum(client.n_images for client in problem.clients)
    for method, ours, theirs in ((Scaffold(), "control", "control"), (FedDyn(2.0), "h", "gradient")):
        draw = torch.Generator().manual_seed(3)
        server = method.start_server(problem.start)
        states = [method.start_client(problem.start) for _ in problem.clients]
        for _ in range(7):
            updates = []
            received = {"weights": server["weights"]} | method.extras(server)
            for i in torch.randperm(len(states), generator=draw)[:take].tolist():
                client = problem.clients[i]
                vectors, states[i] = train_locally(method, received, states[i], [client.gradient] * 4, RATE)
                updates.append(Update(client.n_images, vectors))
            server = method.aggregate(server, updates, total)
        mean = sum(s[theirs] * c.n_images / total for s, c in zip(states, problem.clients, strict=True))
        torch.testing.assert_close(server[ours], mean, rtol=1e-12, atol=1e-12)


def test_a_scaffold_clients_control_is_its_mean_gradient_along_the_way() -> None:
    """Option II's c_i⁺ telescopes to the mean of the gradients that the client met."""
    problem, method = quadratics(), Scaffold()
    met: list[Tensor] = []
    weights = torch.ones_like(problem.start)
    received = {"weights": weights, "control": torch.full_like(weights, 0.7)}

    def gradient(x: Tensor) -> Tensor:
        met.append(problem.clients[0].gradient(x))
        return met[-1]

    vectors, state = train_locally(method, received, {"control": torch.full_like(weights, -0.4)}, [gradient] * 6, 0.02)
    torch.testing.assert_close(state["control"], torch.stack(met).mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(vectors["control_change"], state["control"] + 0.4, rtol=1e-12, atol=1e-12)


def test_a_feddyn_clients_vector_is_the_gradient_at_its_local_minimum() -> None:
    problem, method = quadratics(), FedDyn(alpha=0.5)
    weights = torch.ones_like(problem.start)
    client = problem.clients[2]
    vectors, state = train_locally(
        method, {"weights": weights}, {"gradient": torch.full_like(weights, 0.3)}, [client.gradient] * 3000, RATE
    )
    torch.testing.assert_close(state["gradient"], client.gradient(vectors["weights"]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mu", [0.1, 1.0, 10.0])
def test_fedprox_rests_where_mu_says(mu: float) -> None:
    """With local problems solved exactly, on F_i = ½ a_i (x - b_i)², y_i - x = a_i (b_i - x) / (a_i + μ), and the
    server rests where Σ_i p_i a_i (b_i - x) / (a_i + μ) = 0."""
    a, b = torch.tensor([0.5, 2.0, 4.0]).double(), torch.tensor([-3.0, 1.0, 2.0]).double()
    images = torch.tensor([10.0, 30.0, 60.0]).double()
    clients = [Client(int(n), lambda x, a=a_i, b=b_i: a * (x - b)) for n, a_i, b_i in zip(images, a, b, strict=True)]
    pull = images * a / (a + mu)
    expected = ((pull * b).sum() / pull.sum())[None]
    problem = Problem(clients, ((images * a * b).sum() / (images * a).sum())[None], torch.zeros(1).double())
    found = run(FedProx(mu), problem, 150, steps=150, rate=1 / (4 + mu))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert float((found - problem.optimum).abs()) > 1e-3


def test_fedproxs_bias_falls_as_mu_rises() -> None:
    problem = quadratics()
    far = [distance(run(FedProx(mu), problem, 600), problem) for mu in (0.0, 1.0, 10.0)]
    assert far[0] > far[1] > far[2] > 0
    torch.testing.assert_close(run(FedProx(0.0), problem, 20), run(FedAvg(), problem, 20), rtol=0, atol=0)


@PROBLEMS
@pytest.mark.parametrize("method", [FedAvg(), FedProx(5.0), Scaffold()], ids=lambda m: type(m).__name__)
def test_one_full_batch_step_a_round_is_centralised_gradient_descent(
    make: Callable[[], Problem], method: Method
) -> None:
    problem = make()
    total = sum(client.n_images for client in problem.clients)
    weights = problem.start.clone()
    for _ in range(30):
        weights = weights - RATE * sum(c.gradient(weights) * (c.n_images / total) for c in problem.clients)
    torch.testing.assert_close(run(method, problem, 30, steps=1), weights, rtol=1e-13, atol=1e-13)


def test_averages_weigh_clients_by_their_images() -> None:
    updates = [Update(1, {"v": torch.tensor([0.0, 4.0])}), Update(3, {"v": torch.tensor([8.0, 0.0])})]
    assert weighted_mean(updates, "v").tolist() == [6.0, 1.0]
    assert weighted_sum(updates, "v", 8).tolist() == [3.0, 0.5]
    assert updates[0].vectors["v"].tolist() == [0.0, 4.0]


def test_a_server_learning_rate_scales_the_servers_step() -> None:
    problem = quadratics()
    whole, half = (run(FedAvg(rate), problem, 1) for rate in (1.0, 0.5))
    torch.testing.assert_close(half, whole / 2)


def test_local_steps_leave_what_was_received_as_it_was() -> None:
    problem, method = quadratics(), Scaffold()
    received = {"weights": problem.start, "control": torch.ones_like(problem.start)}
    state = {"control": torch.ones_like(problem.start)}
    before = {k: v.clone() for k, v in (received | {"state": state["control"]}).items()}
    train_locally(method, received, state, [problem.clients[0].gradient] * 3, RATE)
    for name, vector in (received | {"state": state["control"]}).items():
        assert torch.equal(vector, before[name])


def test_the_readmes_method_is_gradient_descent_with_momentum() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n((?:(?!```).)*class FedAvgM.*?)```", readme, re.DOTALL)
    names: dict[str, Any] = {"METHODS": {}}
    exec(code, names)
    problem = quadratics()
    total = sum(client.n_images for client in problem.clients)
    weights, velocity = problem.start.clone(), torch.zeros_like(problem.start)
    for _ in range(15):
        velocity = 0.9 * velocity + RATE * sum(c.gradient(weights) * (c.n_images / total) for c in problem.clients)
        weights = weights - velocity
    torch.testing.assert_close(run(names["METHODS"]["fedavgm"](FederatedConfig()), problem, 15, steps=1), weights)
