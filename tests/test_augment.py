import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedfactory_ray.classification.augment import augment_batch
from fedfactory_ray.classification.ensemble import Predictor
from fedfactory_ray.classification.models import make_classifier
from fedfactory_ray.data.source import Task
from fedfactory_ray.data.transforms import to_tensor
from fedfactory_ray.settings.sections import ClassifierConfig

ALL = {
    "flips": "dihedral",
    "shift": 0.1,
    "scale": 0.2,
    "rotate": 20.0,
    "contrast": 0.3,
    "tint": 0.2,
    "blur": 0.6,
    "noise": 0.4,
}
OFF = {name: "none" if name == "flips" else 0.0 for name in ALL}
SINGLE = [{name: value} for name, value in ALL.items()] + [{"flips": "horizontal"}]


def augmented(images: Tensor, seed: int = 0, **settings: object) -> Tensor:
    config = ClassifierConfig.model_validate(OFF | settings)
    return augment_batch(images, config, torch.Generator().manual_seed(seed))


def images_of(n: int, channels: int = 3, side: int = 8) -> Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(9)) * 2 - 1


def ramp(n: int, side: int = 32) -> Tensor:
    """Images whose value is the horizontal position, from -1 at the left edge to 1 at the right."""
    x = (torch.arange(side) + 0.5) / side * 2 - 1
    return x.view(1, 1, 1, side).expand(n, 1, side, side).contiguous()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 28, 32])
def test_shape_and_type_stay(channels: int, side: int) -> None:
    images = images_of(5, channels, side)
    result = augmented(images, **ALL)
    assert result.shape == images.shape
    assert result.dtype == torch.float32
    assert torch.isfinite(result).all()
    assert not torch.allclose(result, images, atol=0.01)


def test_nothing_changes_when_everything_is_off() -> None:
    images = images_of(5)
    assert torch.equal(augmented(images), images)


@pytest.mark.parametrize("settings", [ALL, *SINGLE], ids=str)
def test_augmentation_is_a_function_of_the_generator(settings: dict[str, object]) -> None:
    images = images_of(6)
    before = images.clone()
    first = augmented(images, 1, **settings)
    torch.manual_seed(77)
    assert torch.equal(augmented(images, 1, **settings), first)
    assert not torch.equal(augmented(images, 2, **settings), first)
    assert torch.equal(images, before)


@pytest.mark.parametrize("settings", [ALL, *SINGLE], ids=str)
def test_each_image_is_changed_in_its_own_way(settings: dict[str, object]) -> None:
    result = augmented(images_of(1).expand(16, 3, 8, 8), **settings)
    kinds = {row.numpy().tobytes() for row in result}
    assert len(kinds) == 2 if settings == {"flips": "horizontal"} else len(kinds) > 4


@pytest.mark.parametrize(("flips", "number"), [("horizontal", 2), ("dihedral", 8)])
def test_flips_are_symmetries_and_all_of_them_occur(flips: str, number: int) -> None:
    image = images_of(1)
    found = {row.numpy().tobytes() for row in augmented(image.expand(200, 3, 8, 8), flips=flips)}
    square = [torch.rot90(i, turns, (2, 3)) for i in (image, image.flip(3)) for turns in range(4)]
    allowed = square if flips == "dihedral" else [image, image.flip(3)]
    assert found == {symmetry[0].contiguous().numpy().tobytes() for symmetry in allowed}
    assert len(found) == number


def test_shifts_reach_their_share_of_the_side_and_no_further() -> None:
    moved = augmented(ramp(400), shift=0.125)
    offsets = (moved - ramp(400))[:, 0, 16, 12:20]
    assert (offsets.amax(1) - offsets.amin(1)).max() < 1e-4  # a pure translation, away from the borders
    share = offsets.mean(1) / 2
    assert 0.11 < share.max() <= 0.1251
    assert -0.1251 <= share.min() < -0.11


def test_shifts_go_up_and_down_too() -> None:
    moved = augmented(ramp(400).transpose(2, 3), shift=0.125)
    share = (moved - ramp(400).transpose(2, 3))[:, 0, 12:20, 16].mean(1) / 2
    assert 0.11 < share.max() <= 0.1251
    assert -0.1251 <= share.min() < -0.11


def test_zoom_keeps_the_centre_and_the_limits() -> None:
    zoomed = augmented(ramp(400), scale=0.2)
    slope = (zoomed[:, 0, 16, 20] - zoomed[:, 0, 16, 11]) / (9 * 2 / 32)
    assert 1.15 < slope.max() <= 1.2001
    assert 0.7999 <= slope.min() < 0.85
    assert zoomed[:, 0, 16, 15:17].mean(1).abs().max() < 1e-4


def test_rotation_turns_about_the_centre_within_its_angle() -> None:
    turned = augmented(ramp(400), rotate=30.0)
    across = (turned[:, 0, 16, 20] - turned[:, 0, 16, 11]) / (9 * 2 / 32)
    down = (turned[:, 0, 20, 16] - turned[:, 0, 11, 16]) / (9 * 2 / 32)
    angle = torch.rad2deg(torch.atan2(down, across))
    assert 27 < angle.max() <= 30.01
    assert -30.01 <= angle.min() < -27
    torch.testing.assert_close(across.square() + down.square(), torch.ones(400), rtol=0, atol=1e-3)


def test_resampling_reflects_at_the_borders() -> None:
    flat = torch.full((50, 1, 8, 8), 0.7)
    torch.testing.assert_close(augmented(flat, shift=0.5, scale=0.5, rotate=180.0), flat)


def lines_through(images: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset (n, C) of each channel's values; checks that one line goes through all its pixels."""
    x, y = images.flatten(2), changed.flatten(2)
    slope = (y.amax(2) - y.amin(2)) / (x.amax(2) - x.amin(2))
    offset = y.mean(2) - slope * x.mean(2)
    torch.testing.assert_close(y, slope[..., None] * x + offset[..., None], rtol=0, atol=1e-4)
    return slope, offset


def test_contrast_scales_all_channels_of_an_image_alike_within_its_share() -> None:
    images = images_of(300)
    slope, offset = lines_through(images, augmented(images, contrast=0.3))
    assert offset.abs().max() < 1e-4
    assert (slope.amax(1) - slope.amin(1)).max() < 1e-4
    assert 1.27 < slope.max() <= 1.3001
    assert 0.6999 <= slope.min() < 0.73


def test_tint_shifts_each_channel_on_its_own_within_its_limit() -> None:
    images = images_of(300)
    slope, offset = lines_through(images, augmented(images, tint=0.2))
    assert (slope - 1).abs().max() < 1e-4
    assert (offset.amax(1) - offset.amin(1)).median() > 0.05
    assert 0.19 < offset.max() <= 0.2001
    assert -0.2001 <= offset.min() < -0.19


def test_blur_mixes_in_the_mean_of_the_neighbours() -> None:
    dot = torch.zeros(300, 1, 9, 9)
    dot[:, :, 4, 4] = 1
    blurred = augmented(dot, blur=0.6)
    weight = blurred[:, 0, 3, 3] * 9
    torch.testing.assert_close(blurred[:, 0, 4, 4], 1 - weight * 8 / 9)
    torch.testing.assert_close(blurred.sum((1, 2, 3)), torch.ones(300))
    assert 0 <= weight.min() < 0.03
    assert 0.57 < weight.max() <= 0.6001
    flat = torch.full((5, 3, 8, 8), 0.3)
    torch.testing.assert_close(augmented(flat, blur=1.0), flat)


def test_noise_has_a_random_deviation_up_to_its_limit() -> None:
    deviation = augmented(torch.zeros(1000, 1, 16, 16), noise=0.5).flatten(1).std(1)
    assert 0.45 < deviation.max() < 0.5 * 1.15
    assert deviation.min() < 0.03
    assert deviation.mean().item() == pytest.approx(0.25, abs=0.02)


# Networks


@pytest.mark.parametrize(
    ("name", "side", "channels"),
    [("cnn", 8, 1), ("cnn", 28, 1), ("cnn", 28, 3), ("cnn", 32, 3), ("resnet18", 8, 1), ("resnet18", 28, 3)],
)
def test_networks_give_logits_for_every_shape(name: str, side: int, channels: int) -> None:
    torch.manual_seed(0)
    network = make_classifier(name, Task(5, channels, side))
    logits = network(images_of(3, channels, side))
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_the_small_network_has_the_size_it_tells() -> None:
    assert sum(p.numel() for p in make_classifier("cnn", Task(10, 3, 28)).parameters()) == pytest.approx(
        288e3, rel=0.01
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_small_images_get_a_stem_that_keeps_their_resolution(channels: int) -> None:
    def side_after_stem(resolution: int) -> int:
        network = make_classifier("resnet18", Task(2, channels, resolution))
        stem = torch.nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
        return int(stem(images_of(2, channels, resolution)).shape[-1])

    assert (side_after_stem(32), side_after_stem(64), side_after_stem(128)) == (32, 64, 32)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 28])
def test_the_predictor_equals_transform_network_and_softmax(channels: int, side: int) -> None:
    torch.manual_seed(0)
    network = make_classifier("cnn", Task(4, channels, side)).eval()
    pixels = torch.randint(0, 256, (6, side, side, channels), dtype=torch.uint8)
    with torch.no_grad():
        found, expected = Predictor([network])(pixels), F.log_softmax(network(to_tensor(pixels)), 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.exp().sum(1), torch.ones(6))


@pytest.mark.parametrize("name", ["cnn", "fast"])
def test_the_predictor_can_be_exported_for_any_number_of_images(name: str) -> None:
    torch.manual_seed(0)
    predictor = Predictor([make_classifier(name, Task(4, 1, 8), flips="horizontal")], 1.5).eval()
    pixels = torch.randint(0, 256, (6, 8, 8, 1), dtype=torch.uint8)
    exported = torch.export.export(predictor, (pixels,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},)).module()
    for n in (1, 2, 6):
        torch.testing.assert_close(exported(pixels[:n]), predictor(pixels[:n]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["cnn", "resnet18", "resnet50"])
def test_group_norm_keeps_no_statistics_and_batch_norm_does(name: str) -> None:
    group, batch = (make_classifier(name, Task(4, 3, 8), norm) for norm in ("group", "batch"))
    assert not list(group.buffers())
    assert any(buffer_name.endswith("running_mean") for buffer_name, _ in batch.named_buffers())
    assert [p.shape for p in group.parameters()] == [p.shape for p in batch.parameters()]
