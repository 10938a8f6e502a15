import pytest
import torch
from torch import Tensor

from fedfactory_ray.data.transforms import augment, undo_augment
from fedfactory_ray.generation.edm import SIGMA_DATA, c_in, c_noise, expand
from fedfactory_ray.generation.unet import AUGMENTATIONS, TIME_SCALE, Denoiser
from fedfactory_ray.settings.sections import GeneratorConfig

SIGMAS = torch.tensor([0.01, 0.5, 20.0])


def make(channels: int = 1, resolution: int = 8, /, **settings: object) -> Denoiser:
    torch.manual_seed(0)
    config = GeneratorConfig.model_validate({"channels": (8, 16), "components": 10, **settings})
    return Denoiser(config, channels, resolution)


def images_of(n: int, channels: int = 1, side: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def wake(denoiser: Denoiser) -> Denoiser:
    """Give the zero last layer weights, so that the network says something."""
    torch.manual_seed(1)
    torch.nn.init.normal_(denoiser.unet.conv_out.weight, std=0.05)
    return denoiser.eval()


# Attention


def test_heads_have_the_channels_that_they_are_told() -> None:
    blocks = make(channels=(16, 32), attention_levels=(1,), head_channels=16).unet.down_blocks[1].attentions
    assert {attention.heads for attention in blocks} == {2}


def test_heads_that_do_not_divide_a_level_are_refused() -> None:
    with pytest.raises(ValueError, match=r"head_channels=12: the attending levels have \[8, 16\]"):
        GeneratorConfig(channels=(8, 16), attention_levels=(0,), head_channels=12)


# Symmetries


def test_the_eight_symmetries_of_the_square_are_distinct_and_zero_is_none() -> None:
    image = torch.arange(9.0).view(1, 1, 3, 3)
    results = augment(image.expand(8, 1, 3, 3), torch.arange(8))
    expected = {
        tuple(torch.rot90(flipped, turns, (2, 3)).flatten().tolist())
        for flipped in (image, image.flip(3))
        for turns in range(4)
    }
    assert {tuple(result.flatten().tolist()) for result in results} == expected
    assert len(expected) == 8
    assert torch.equal(results[:1], image)
    assert torch.equal(results[1:2], image.flip(3))


def test_each_image_gets_its_own_symmetry_in_all_channels() -> None:
    images, chosen = images_of(16, 3), torch.arange(16) % 8
    together = augment(images, chosen)
    for i in range(16):
        for channel in range(3):
            alone = augment(images[i : i + 1, channel : channel + 1], chosen[i : i + 1])
            assert torch.equal(together[i, channel], alone[0, 0])


def test_symmetries_are_told_apart_by_the_network_as_often_as_there_are() -> None:
    assert AUGMENTATIONS == {"none": 1, "flip": 2, "dihedral": 8}
    for name, number in AUGMENTATIONS.items():
        assert make(augment=name).unet.config.num_class_embeds == (None if number == 1 else number)


# Statistics


@pytest.mark.parametrize("prediction", ["residual", "image", "gaussian"])
def test_standardised_images_have_mean_zero_and_the_datas_deviation(prediction: str) -> None:
    images = images_of(200, 3) * torch.linspace(0.1, 1, 8) + 0.2
    denoiser = make(3, prediction=prediction)
    denoiser.fit_statistics(images)
    data = denoiser.standardise(images)
    assert data.mean(0).abs().max() < 1e-4
    assert data.square().mean().sqrt().item() == pytest.approx(SIGMA_DATA, rel=1e-4)
    torch.testing.assert_close(denoiser.restore(data), images, rtol=0, atol=1e-5)
    torch.testing.assert_close(denoiser.standardise(denoiser.restore(data)), data, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [1, 5])
def test_a_class_of_equal_images_keeps_finite_statistics(n: int) -> None:
    images = images_of(1).expand(n, 1, 8, 8)
    denoiser = make(prediction="gaussian")
    denoiser.fit_statistics(images)
    data = denoiser.standardise(images)
    assert torch.isfinite(data).all()
    torch.testing.assert_close(denoiser.restore(data), images)
    assert torch.isfinite(denoiser(data[:1] + 1, torch.ones(1))).all()
    assert torch.isfinite(denoiser.loss(data[:1], torch.ones(1), torch.randn(1, 1, 8, 8)))


def test_the_image_shape_is_that_of_the_statistics() -> None:
    assert make(3, 12).image_shape == (3, 12, 12)
    assert make().image_shape == (1, 8, 8)


# The network behind its preconditioning

VARIANTS = [
    {"prediction": "residual"},
    {"prediction": "image"},
    {"prediction": "gaussian"},
    {"prediction": "gaussian", "components": 1000},
    {"patch": 2},
    {"attention_levels": (1,)},
    {"attention_levels": (0, 1)},
    {"augment": "flip"},
    {"augment": "dihedral", "patch": 2, "attention_levels": (1,), "prediction": "gaussian"},
    {"channels": (8,)},
    {"channels": (8, 8, 16), "layers_per_block": 2},
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_untrained_network_returns_exactly_the_skip(variant: dict[str, object], channels: int) -> None:
    denoiser = make(channels, **variant).eval()
    denoiser.fit_statistics(images_of(30, channels))
    x = torch.randn(3, channels, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(denoiser(x, SIGMAS), denoiser.preconditioner.skip(x, SIGMAS))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant_denoises_and_learns(variant: dict[str, object]) -> None:
    denoiser = wake(make(3, **variant)).train()
    data = images_of(3, 3)
    denoiser.fit_statistics(data)
    augmentation = torch.tensor([0, 1, 1]) if "augment" in variant else None
    denoised = denoiser(data, SIGMAS, augmentation)
    assert denoised.shape == data.shape
    assert denoised.dtype == torch.float32
    assert not torch.allclose(denoised, denoiser.preconditioner.skip(data, SIGMAS))
    denoiser.loss(data, SIGMAS, torch.randn_like(data), augmentation).backward()
    gradients = [parameter.grad for parameter in denoiser.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert sum(int(g.abs().max() > 0) for g in gradients if g is not None) > 0.9 * len(gradients)


@pytest.mark.parametrize("prediction", ["residual", "image", "gaussian"])
def test_denoising_follows_equation_7(prediction: str) -> None:
    denoiser = wake(make(prediction=prediction))
    denoiser.fit_statistics(images_of(30))
    x = images_of(3, seed=4)
    raw = denoiser.unet(x * expand(c_in(SIGMAS)), c_noise(SIGMAS) * TIME_SCALE).sample
    part = denoiser.preconditioner
    torch.testing.assert_close(denoiser(x, SIGMAS), part.skip(x, SIGMAS) + expand(part.c_out(SIGMAS)) * raw)


@pytest.mark.parametrize("prediction", ["residual", "image", "gaussian"])
def test_loss_is_the_weighted_squared_error(prediction: str) -> None:
    denoiser = wake(make(prediction=prediction))
    denoiser.fit_statistics(images_of(30))
    data, noise = images_of(3, seed=5), torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(6))
    errors = (denoiser(data + noise * SIGMAS.view(3, 1, 1, 1), SIGMAS) - data).square().mean((1, 2, 3))
    expected = (denoiser.preconditioner.weight(SIGMAS) * errors).mean()
    assert denoiser.loss(data, SIGMAS, noise).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_untrained_residual_loss_is_about_one_at_every_level() -> None:
    draw = torch.Generator().manual_seed(0)
    data = SIGMA_DATA * torch.randn(200, 1, 8, 8, generator=draw)
    denoiser = make()
    for level in (0.02, 0.5, 30.0):
        noise = torch.randn(data.shape, generator=draw)
        loss = denoiser.loss(data, torch.full((200,), level), noise)
        assert loss.item() == pytest.approx(1, rel=0.05)


def test_images_of_a_batch_do_not_influence_each_other() -> None:
    denoiser = wake(make(attention_levels=(1,)))
    x = images_of(3)
    together, alone = denoiser(x, SIGMAS), torch.cat([denoiser(x[i : i + 1], SIGMAS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_no_augmentation_means_the_identity_to_the_network() -> None:
    denoiser = wake(make(augment="dihedral"))
    x = images_of(3)
    assert torch.equal(denoiser(x, SIGMAS), denoiser(x, SIGMAS, torch.zeros(3, dtype=torch.long)))
    assert not torch.allclose(denoiser(x, SIGMAS), denoiser(x, SIGMAS, torch.full((3,), 5)))


def test_an_impossible_resolution_is_refused_with_a_possible_one() -> None:
    with pytest.raises(ValueError, match=r"resolution 10 .* needs a multiple of 4.*data.resolution=8"):
        make(1, 10, patch=2)


# The filter of turned images


def lopsided(n: int) -> Tensor:
    """Images that vary along rows only, the more the further down, and hardly elsewhere: no symmetry leaves them."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(n, 1, 8, 1, generator=draw) * torch.linspace(0, 0.4, 8).view(8, 1) ** 2
    return (rows + 0.001 * torch.randn(n, 1, 8, 8, generator=draw)).clamp(-1, 1)


def target_square(denoiser: Denoiser, data: Tensor, symmetry: int) -> float:
    """Mean square of what the network should say, where its last layer is still zero: the loss."""
    n, draw = len(data), torch.Generator().manual_seed(1)
    told = torch.full((n,), symmetry)
    sigma = torch.full((n,), 0.05)
    noise = torch.randn(data.shape, generator=draw)
    with torch.no_grad():
        return float(denoiser.loss(augment(data, told), sigma, augment(noise, told), told))


def test_a_turned_image_is_as_well_scaled_a_target_as_an_upright_one() -> None:
    denoiser, images = make(prediction="gaussian", augment="dihedral"), lopsided(200)
    denoiser.fit_statistics(images)
    data = denoiser.standardise(images)
    found = [target_square(denoiser, data, symmetry) for symmetry in range(8)]
    assert found[0] == pytest.approx(1, rel=0.2)
    assert found == pytest.approx([found[0]] * 8, rel=1e-4)


def test_symmetries_are_undone() -> None:
    images, symmetry = images_of(8), torch.arange(8)
    assert torch.equal(undo_augment(augment(images, symmetry), symmetry), images)
