import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedfactory_ray.data.transforms import resize, resize_batch, to_tensor, to_uint8


def noise_images(n: int, height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (n, height, width, channels)).astype(np.uint8)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.sampled_from([1, 3]), st.integers(0, 1000))
def test_every_pixel_survives_the_way_to_a_tensor_and_back(n: int, side: int, channels: int, seed: int) -> None:
    images = noise_images(n, side, side, channels, seed)
    assert np.array_equal(to_uint8(to_tensor(images)), images)


def test_all_256_values_survive_the_round_trip() -> None:
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert np.array_equal(to_uint8(to_tensor(images)), images)


def test_tensors_are_channels_first_between_minus_one_and_one() -> None:
    images = np.zeros((1, 2, 3, 3), np.uint8)
    images[0, 1, 2] = (255, 0, 51)
    tensor = to_tensor(images)
    assert tensor.dtype == torch.float32
    assert tensor.shape == (1, 3, 2, 3)
    assert tensor.is_contiguous()
    assert tensor[0, :, 1, 2].tolist() == pytest.approx([1.0, -1.0, -0.6])
    assert (tensor[0, :, 0] == -1).all()


def test_tensors_are_accepted_as_arrays_are() -> None:
    images = noise_images(3, 5, 5, 3)
    assert torch.equal(to_tensor(torch.from_numpy(images)), to_tensor(images))


def test_values_beyond_the_range_are_clipped_and_others_rounded_to_nearest() -> None:
    values = torch.tensor([-7.0, -1.0, 0.0, 1.0, 9.0, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1]).view(1, 1, 1, 7)
    assert to_uint8(values).ravel().tolist() == [0, 0, 128, 255, 255, 100, 101]


def test_images_of_the_right_side_come_back_untouched() -> None:
    images = noise_images(3, 8, 8, 1)
    assert np.array_equal(resize_batch(images, 8), images)
    assert np.array_equal(resize_batch(images, None), images)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(["L", "RGB", "RGBA"]), st.integers(1, 40))
def test_resizing_equals_torchvisions(height: int, width: int, mode: str, resolution: int) -> None:
    from torchvision.transforms import v2

    pixels = noise_images(1, height, width, len(mode) if mode != "L" else 1)[0]
    image = Image.fromarray(pixels.squeeze(-1) if mode == "L" else pixels, mode)
    spec = v2.Compose([v2.Resize(resolution, v2.InterpolationMode.BICUBIC), v2.CenterCrop(resolution)])
    assert np.array_equal(np.asarray(resize(image, resolution)), np.asarray(spec(image)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 20), (20, 9), (4, 30)])
def test_a_resized_batch_holds_each_image_resized_alone(height: int, width: int, channels: int) -> None:
    images = noise_images(3, height, width, channels)
    resized = resize_batch(images, 6)
    assert resized.shape == (3, 6, 6, channels)
    assert resized.dtype == np.uint8
    for row, image in zip(resized, images, strict=True):
        alone = resize(Image.fromarray(image[..., 0] if channels == 1 else image), 6)
        assert np.array_equal(row, np.asarray(alone).reshape(6, 6, channels))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 255), st.integers(4, 40), st.integers(4, 40), st.integers(4, 40))
def test_flat_images_stay_flat(value: int, height: int, width: int, resolution: int) -> None:
    images = np.full((1, height, width, 3), value, np.uint8)
    assert (resize_batch(images, resolution) == value).all()


def test_the_centre_square_is_kept() -> None:
    image = np.zeros((1, 10, 30, 1), np.uint8)
    image[:, :, :10], image[:, :, 10:20], image[:, :, 20:] = 50, 100, 150
    kept = resize_batch(image, 10)
    assert (kept == 100).all()


def test_shrinking_averages_instead_of_skipping_pixels() -> None:
    stripes = np.zeros((1, 32, 32, 1), np.uint8)
    stripes[:, :, ::2] = 255
    shrunk = resize_batch(stripes, 4).astype(int)
    assert np.abs(shrunk - 127).max() <= 10


def test_colours_keep_their_channel() -> None:
    red = np.zeros((1, 12, 12, 3), np.uint8)
    red[..., 0] = 200
    assert resize_batch(red, 5).reshape(-1, 3).tolist() == [[200, 0, 0]] * 25
