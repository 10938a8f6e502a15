import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedfactory_ray.generation.edm import (
    IMAGE_WEIGHT_CAP,
    SIGMA_DATA,
    CleanImage,
    Gaussian,
    Residual,
    c_in,
    c_noise,
    expand,
    sample_sigma,
)

SIGMAS = torch.tensor([0.002, 0.05, 0.3, 0.5, 1.0, 7.0, 80.0])
levels = st.floats(0.002, 80.0)


def covariance_of(spectrum: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A covariance float64 (pixels, pixels) with this spectrum, and its eigenvectors as rows."""
    draw = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=draw, dtype=torch.float64)).Q.T
    return (directions.T * spectrum.double()) @ directions, directions


def gaussian_with(directions: Tensor, variances: Tensor, floor: float) -> Gaussian:
    model = Gaussian(directions.shape[1], len(directions))
    model.basis.copy_(directions)
    model.variances.copy_(variances)
    model.floor.fill_(floor)
    return model


# The three preconditioners against Karras et al. 2022, table 1


@settings(max_examples=50, deadline=None)
@given(levels)
def test_residual_is_table_1(level: float) -> None:
    sigma, both = torch.tensor([level]), level**2 + SIGMA_DATA**2
    x = torch.full((1, 1, 1, 1), 3.0)
    assert Residual().skip(x, sigma).item() == pytest.approx(3 * SIGMA_DATA**2 / both, rel=1e-5)
    assert Residual().c_out(sigma).item() == pytest.approx(level * SIGMA_DATA / math.sqrt(both), rel=1e-5)
    assert Residual().weight(sigma).item() == pytest.approx(both / (level * SIGMA_DATA) ** 2, rel=1e-5)
    assert c_in(sigma).item() == pytest.approx(1 / math.sqrt(both), rel=1e-5)
    assert c_noise(sigma).item() == pytest.approx(math.log(level) / 4, rel=1e-5, abs=1e-6)


def test_the_network_sees_and_has_to_give_unit_variance() -> None:
    draw = torch.Generator().manual_seed(0)
    n = 200_000
    for level in (0.05, 0.5, 5.0):
        sigma = torch.full((n,), level)
        data = SIGMA_DATA * torch.randn(n, 1, 1, 1, generator=draw)
        x = data + level * torch.randn(n, 1, 1, 1, generator=draw)
        target = (data - Residual().skip(x, sigma)) / expand(Residual().c_out(sigma))
        assert (x * expand(c_in(sigma))).var().item() == pytest.approx(1, rel=0.02)
        assert target.var().item() == pytest.approx(1, rel=0.02)


def test_clean_image_prediction_has_no_skip_and_a_capped_weight() -> None:
    model, x = CleanImage(), torch.randn(7, 1, 2, 2)
    assert (model.skip(x, SIGMAS) == 0).all()
    assert model.c_out(SIGMAS).tolist() == [SIGMA_DATA] * 7
    expected = [min(float(w), IMAGE_WEIGHT_CAP) for w in Residual().weight(SIGMAS)]
    assert model.weight(SIGMAS).tolist() == pytest.approx(expected)
    assert model.weight(SIGMAS)[0] == IMAGE_WEIGHT_CAP > model.weight(SIGMAS)[-1]


@pytest.mark.parametrize("model", [Residual(), gaussian_with(torch.eye(3, 12), torch.ones(3), 0.1)])
def test_weight_is_the_inverse_square_of_the_output_scale(model: Residual | Gaussian) -> None:
    assert (model.weight(SIGMAS) * model.c_out(SIGMAS) ** 2).tolist() == pytest.approx([1.0] * 7, rel=1e-5)


def test_noise_levels_are_log_normal_and_follow_the_generator() -> None:
    sigma = sample_sigma(100_000, -0.8, 1.2, torch.Generator().manual_seed(1))
    assert sigma.dtype == torch.float32
    assert sigma.log().mean().item() == pytest.approx(-0.8, abs=0.02)
    assert sigma.log().std().item() == pytest.approx(1.2, abs=0.02)
    assert torch.equal(sigma, sample_sigma(100_000, -0.8, 1.2, torch.Generator().manual_seed(1)))
    assert not torch.equal(sigma, sample_sigma(100_000, -0.8, 1.2, torch.Generator().manual_seed(2)))


# Gaussian


@pytest.mark.parametrize("components", [1, 5, 48])
def test_gaussian_of_white_data_is_residual(components: int) -> None:
    _, directions = covariance_of(torch.ones(48))
    model = gaussian_with(directions[:components], torch.full((components,), SIGMA_DATA**2), SIGMA_DATA**2)
    x = torch.randn(7, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model.skip(x, SIGMAS), Residual().skip(x, SIGMAS), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.c_out(SIGMAS), Residual().c_out(SIGMAS))
    torch.testing.assert_close(model.weight(SIGMAS), Residual().weight(SIGMAS))


def wiener(covariance: Tensor, sigma: float) -> Tensor:
    """S (S + sigma² I)⁻¹, densely, in float64."""
    return covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(len(covariance), dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), levels)
def test_gaussian_skip_is_the_wiener_filter_when_all_components_are_kept(seed: int, level: float) -> None:
    spectrum = torch.rand(27, generator=torch.Generator().manual_seed(seed)) * 2 + 1e-3
    covariance, directions = covariance_of(spectrum, seed)
    model = gaussian_with(directions, spectrum, 1e-5)
    x = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    expected = (x.reshape(4, -1).double() @ wiener(covariance, level)).view_as(x).float()
    torch.testing.assert_close(model.skip(x, torch.full((4,), level)), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 15), levels)
def test_gaussian_skip_takes_the_floor_for_directions_left_out(seed: int, kept: int, level: float) -> None:
    spectrum = torch.full((16,), 0.04)
    spectrum[:kept] = torch.rand(kept, generator=torch.Generator().manual_seed(seed)) + 0.1
    covariance, directions = covariance_of(spectrum, seed)
    model = gaussian_with(directions[:kept], spectrum[:kept], 0.04)
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    expected = (x.reshape(3, -1).double() @ wiener(covariance, level)).view_as(x).float()
    torch.testing.assert_close(model.skip(x, torch.full((3,), level)), expected, rtol=1e-4, atol=1e-5)


def test_each_image_is_filtered_at_its_own_level() -> None:
    _, directions = covariance_of(torch.ones(16))
    model = gaussian_with(directions[:4], torch.tensor([4.0, 2.0, 1.0, 0.5]), 0.1)
    x = torch.randn(7, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    alone = torch.cat([model.skip(x[i : i + 1], SIGMAS[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(model.skip(x, SIGMAS), alone)
    torch.testing.assert_close(model.c_out(SIGMAS), torch.cat([model.c_out(s[None]) for s in SIGMAS]))


@pytest.mark.parametrize("level", [0.05, 0.3, 1.0, 5.0])
def test_gaussian_output_scale_is_the_measured_error_of_the_filter(level: float) -> None:
    spectrum = torch.cat([torch.tensor([3.0, 1.0, 0.4]), torch.full((13,), 0.02)])
    _, directions = covariance_of(spectrum, 5)
    model = gaussian_with(directions[:3], spectrum[:3], 0.02)
    draw, n = torch.Generator().manual_seed(6), 40_000
    data = ((torch.randn(n, 16, generator=draw) * spectrum.sqrt()) @ directions.float()).view(n, 1, 4, 4)
    sigma = torch.full((n,), level)
    x = data + level * torch.randn(data.shape, generator=draw)
    measured = (model.skip(x, sigma) - data).square().mean().item()
    assert model.c_out(sigma[:1]).item() ** 2 == pytest.approx(measured, rel=0.02)


def sample_low_rank(n: int, variances: list[float], floor: float, side: int, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Centred Gaussian data (n, 1, side, side), and the rows of their principal directions."""
    pixels = side**2
    _, directions = covariance_of(torch.ones(pixels), seed)
    draw = torch.Generator().manual_seed(seed)
    spectrum = torch.tensor([*variances, *[floor] * (pixels - len(variances))])
    data = (torch.randn(n, pixels, generator=draw) * spectrum.sqrt()) @ directions.float()
    return (data - data.mean(0)).view(n, 1, side, side), directions[: len(variances)].float()


def test_fit_recovers_a_low_rank_covariance() -> None:
    torch.manual_seed(0)
    variances = [9.0, 4.0, 1.0]
    data, directions = sample_low_rank(20_000, variances, 0.01, 6)
    model = Gaussian(36, 3)
    model.fit(data)
    assert model.variances.tolist() == pytest.approx(variances, rel=0.05)
    assert model.floor.item() == pytest.approx(0.01, rel=0.05)
    overlap = (model.basis @ directions.T).abs()
    assert overlap.diagonal().min() > 0.999


def test_fit_equals_the_dense_eigendecomposition() -> None:
    torch.manual_seed(0)
    data, _ = sample_low_rank(300, [4.0, 2.0, 1.0, 0.5, 0.25], 0.05, 5)
    model = Gaussian(25, 12)
    model.fit(data)
    flat = data.reshape(300, -1).double()
    values = torch.linalg.eigvalsh(flat.T @ flat / 300).flip(0)
    assert model.variances.tolist() == pytest.approx(values[:12].tolist(), rel=1e-3)
    assert model.floor.item() == pytest.approx(values[12:].mean().item(), rel=1e-3)
    torch.testing.assert_close(model.basis @ model.basis.T, torch.eye(12), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("n", "components"), [(200, 8), (200, 64), (10, 8), (10, 64), (3, 64), (2, 4), (1, 4)])
def test_fit_keeps_the_total_variance_for_any_class_size(n: int, components: int) -> None:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(n)
    data = torch.randn(n, 1, 8, 8, generator=draw)
    data = (data - data.mean(0)) * SIGMA_DATA
    model = Gaussian(64, components)
    model.fit(data)
    kept, pixels = int((model.basis.square().sum(1) > 0.5).sum()), 64
    total = model.variances[:kept].sum() + (pixels - kept) * model.floor
    assert kept <= max(n // 2, 0)
    assert total.item() == pytest.approx(data.square().sum().item() / n, rel=1e-3, abs=1e-3)
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers())
    assert model.floor > 0
    # A large noise tells nothing: the filter's error is then the data's variance.
    assert model.c_out(torch.tensor([1e4])).item() ** 2 == pytest.approx(total.item() / pixels, rel=1e-3)


def test_components_that_a_small_class_lacks_have_no_effect() -> None:
    data, _ = sample_low_rank(8, [4.0, 1.0], 0.01, 6)
    few, many = Gaussian(36, 4), Gaussian(36, 30)
    for model in (few, many):
        torch.manual_seed(0)
        model.fit(data)
    x = torch.randn(7, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(few.skip(x, SIGMAS), many.skip(x, SIGMAS), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(few.c_out(SIGMAS), many.c_out(SIGMAS), rtol=1e-4, atol=1e-6)


def test_gaussian_limits_are_the_input_and_the_mean() -> None:
    data, _ = sample_low_rank(100, [1.0, 0.5], 0.1, 4)
    model = Gaussian(16, 2)
    model.fit(data)
    x = torch.randn(1, 1, 4, 4)
    torch.testing.assert_close(model.skip(x, torch.tensor([1e-4])), x, rtol=1e-3, atol=1e-4)
    assert model.skip(x, torch.tensor([1e4])).abs().max() < 1e-6


def test_expand_lets_levels_multiply_images() -> None:
    product = torch.ones(3, 2, 4, 4) * expand(torch.tensor([1.0, 2.0, 3.0]))
    assert np.array_equal(product.amax((1, 2, 3)), [1, 2, 3])
    assert np.array_equal(product.amin((1, 2, 3)), [1, 2, 3])
