from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedfactory_ray.generation.edm import SIGMA_DATA
from fedfactory_ray.generation.samplers import SOLVERS, Denoise, dpmpp, dpmpp3m, heun, karras_sigmas, solver_steps

SIGMA_MIN, SIGMA_MAX, RHO = 0.01, 40.0, 7.0
VARIANCES = torch.tensor([2.0, 0.5, 0.25, 0.05], dtype=torch.float64).view(1, 1, 2, 2)


def linear(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of N(0, diag(VARIANCES))."""
    return x * VARIANCES / (VARIANCES + sigma**2)


def mixture(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of two points, ±1 in every pixel independently."""
    return torch.tanh(x / sigma**2)


def counting(denoise: Denoise) -> tuple[Denoise, list[float]]:
    calls: list[float] = []

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(float(sigma))
        return denoise(x, sigma)

    return counted, calls


def start(n: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 2, 2, generator=draw, dtype=torch.float64) * SIGMA_MAX


def exact(x: Tensor) -> Tensor:
    """Closed form: the flow of the ODE scales every pixel to the deviation at SIGMA_MIN, then it is denoised."""
    there = x * ((VARIANCES + SIGMA_MIN**2) / (VARIANCES + SIGMA_MAX**2)).sqrt()
    return linear(there, torch.tensor(SIGMA_MIN, dtype=torch.float64))


def error_of(solver: str, steps: int) -> float:
    found = SOLVERS[solver](linear, start(), karras_sigmas(steps, SIGMA_MIN, SIGMA_MAX, RHO))
    return float((found - exact(start())).abs().max())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.floats(0.001, 0.5), st.floats(1.0, 100.0), st.floats(1.0, 9.0))
def test_noise_levels_fall_from_the_largest_to_the_smallest_and_then_to_zero(
    steps: int, low: float, high: float, rho: float
) -> None:
    sigmas = karras_sigmas(steps, low, high, rho)
    assert sigmas.shape == (steps + 1,)
    assert sigmas.dtype == torch.float64
    assert sigmas[0].item() == pytest.approx(high, rel=1e-9)
    assert sigmas[-1] == 0
    if steps > 1:
        assert sigmas[-2].item() == pytest.approx(low, rel=1e-9)
    assert all(before > after for before, after in pairwise(sigmas.tolist()))


def test_noise_levels_are_even_in_their_rho_th_root() -> None:
    roots = karras_sigmas(9, SIGMA_MIN, SIGMA_MAX, RHO)[:-1] ** (1 / RHO)
    assert torch.diff(roots).tolist() == pytest.approx([float(roots[1] - roots[0])] * 8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_converge_to_the_closed_form_with_second_order(solver: str) -> None:
    errors = [error_of(solver, steps) for steps in (32, 64, 128, 256)]
    assert errors[-1] < 1e-2
    assert all(coarse > 3 * fine for coarse, fine in pairwise(errors)), errors
    assert errors[0] > 27 * errors[-1]


def test_three_points_converge_with_third_order() -> None:
    errors = [error_of("dpmpp3m", steps) for steps in (32, 64, 128, 256)]
    assert all(coarse > 6 * fine for coarse, fine in pairwise(errors)), errors
    assert errors[-1] < error_of("dpmpp", 256) / 10


@pytest.mark.parametrize("denoise", [linear, mixture])
def test_the_solvers_agree_in_the_limit(denoise: Denoise) -> None:
    sigmas = karras_sigmas(400, SIGMA_MIN, SIGMA_MAX, RHO)
    expected = heun(denoise, start(), sigmas)
    for solver in (dpmpp, dpmpp3m):
        torch.testing.assert_close(solver(denoise, start(), sigmas), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_have_the_datas_variance(solver: str) -> None:
    found = SOLVERS[solver](linear, start(20_000), karras_sigmas(160, SIGMA_MIN, SIGMA_MAX, RHO))
    assert found.var(0).flatten().tolist() == pytest.approx(VARIANCES.flatten().tolist(), rel=0.03)


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_of_two_points_lie_on_them_in_the_basin_of_their_noise(solver: str) -> None:
    found = SOLVERS[solver](mixture, start(50), karras_sigmas(40, SIGMA_MIN, SIGMA_MAX, RHO))
    torch.testing.assert_close(found, start(50).sign(), rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40))
def test_evaluations_are_those_of_the_docstrings(steps: int) -> None:
    sigmas = karras_sigmas(steps, SIGMA_MIN, SIGMA_MAX, RHO)
    for solver, expected in ((heun, 2 * len(sigmas) - 3), (dpmpp, len(sigmas) - 1), (dpmpp3m, len(sigmas) - 1)):
        denoise, calls = counting(linear)
        solver(denoise, start(), sigmas)
        assert len(calls) == expected
        assert min(calls) > 0


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 100), st.sampled_from(sorted(SOLVERS)))
def test_steps_spend_the_budget_and_no_more(evaluations: int, solver: str) -> None:
    def spent(steps: int) -> int:
        denoise, calls = counting(linear)
        SOLVERS[solver](denoise, start(1), karras_sigmas(steps, SIGMA_MIN, SIGMA_MAX, RHO))
        return len(calls)

    steps = solver_steps(solver, evaluations)
    assert spent(steps) <= evaluations < spent(steps + 1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step_is_the_denoiser_itself(solver: str) -> None:
    sigmas = karras_sigmas(1, SIGMA_MIN, SIGMA_MAX, RHO)
    torch.testing.assert_close(SOLVERS[solver](linear, start(), sigmas), linear(start(), sigmas[0]))


@pytest.mark.parametrize("solver", SOLVERS)
def test_samplers_keep_single_precision_and_leave_the_noise_alone(solver: str) -> None:
    noise = start().float()
    before = noise.clone()
    found = SOLVERS[solver](lambda x, s: linear(x, s).float(), noise, karras_sigmas(10, SIGMA_MIN, SIGMA_MAX, RHO))
    assert found.dtype == torch.float32
    assert torch.equal(noise, before)


@pytest.mark.parametrize("denoise", [linear, mixture])
@pytest.mark.parametrize("steps", [5, 18, 30])
def test_dpmpp_equals_diffusers(denoise: Callable[[Tensor, Tensor], Tensor], steps: int) -> None:
    from diffusers import EDMDPMSolverMultistepScheduler

    scheduler = EDMDPMSolverMultistepScheduler(
        sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, sigma_data=SIGMA_DATA, rho=RHO, solver_order=2
    )
    scheduler.set_timesteps(steps)
    x = start()
    for step, time in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[step].double()
        both = sigma**2 + SIGMA_DATA**2
        network = (denoise(x, sigma) - x * SIGMA_DATA**2 / both) / (sigma * SIGMA_DATA / both.sqrt())
        x = scheduler.step(network, time, x).prev_sample
    found = dpmpp(denoise, start(), karras_sigmas(steps, SIGMA_MIN, SIGMA_MAX, RHO))
    torch.testing.assert_close(found, x.double(), rtol=1e-4, atol=1e-4)
