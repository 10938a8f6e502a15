"""Samplers: short pure functions from noise to images, given a denoiser D(x, sigma)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Falling noise levels float64 (steps + 1,), the last one 0 (Karras et al. 2022, eq. 5)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """Heun's second-order method (Karras et al. 2022, algorithm 1): 2 len(sigmas) - 3 evaluations.

    `x` is pure noise (n, C, H, W) of deviation sigmas[0]; returns images (n, C, H, W).
    """
    for sigma, following in pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        euler = x + (following - sigma) * slope
        if following > 0:
            slope = (slope + (euler - denoise(euler, following)) / following) / 2
        x = x + (following - sigma) * slope
    return x


def dpmpp(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) in sigma: len(sigmas) - 1 evaluations. Shapes as in `heun`."""
    previous, previous_step = None, None
    for sigma, following in pairwise(sigmas):
        clean = denoise(x, sigma)
        if following == 0:
            return clean
        step = (sigma / following).log()
        target = clean
        if previous is not None and previous_step is not None:
            target = clean + (clean - previous) * step / (2 * previous_step)
        x = (following / sigma) * x - torch.expm1(-step) * target
        previous, previous_step = clean, step
    return x


def dpmpp3m(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """DPM-Solver++(3M) (Lu et al. 2022, sec. 4) in sigma: len(sigmas) - 1 evaluations. Shapes as in `heun`.

    A step of u = ln(sigma / following) solves dx = (D - x) du exactly for the D that is the polynomial through the last
    three clean images, in Newton's form D0 + u a + u (u + h1) b.
    """
    cleans: list[Tensor] = []
    steps: list[Tensor] = []
    for sigma, following in pairwise(sigmas):
        cleans = [denoise(x, sigma), *cleans[:2]]
        if following == 0:
            return cleans[0]
        h = (sigma / following).log()
        constant = -torch.expm1(-h)
        linear = h - constant
        x = (following / sigma) * x + constant * cleans[0]
        if len(cleans) > 1:
            a = (cleans[0] - cleans[1]) / steps[0]
            x = x + linear * a
            if len(cleans) > 2:
                b = (a - (cleans[1] - cleans[2]) / steps[1]) / (steps[0] + steps[1])
                x = x + (h**2 - (2 - steps[0]) * linear) * b
        steps = [h, *steps[:1]]
    return x


SOLVERS = {"heun": heun, "dpmpp": dpmpp, "dpmpp3m": dpmpp3m}


def solver_steps(solver: str, evaluations: int) -> int:
    """Number of steps that spend at most `evaluations` network calls."""
    return (evaluations + 1) // 2 if solver == "heun" else evaluations


def network_evaluations(solver: str, evaluations: int) -> int:
    """Network evaluations that an image really costs where `evaluations` are allowed."""
    steps = solver_steps(solver, evaluations)
    return 2 * steps - 1 if solver == "heun" else steps
