"""The one transform that training, synthesis and test share: uint8 images of one side, then values in [-1, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:  # torch takes seconds to import, and reading data does not need it
    import torch
    from torch import Tensor


def resize(image: Image.Image, resolution: int) -> Image.Image:
    """Resize the shorter side to `resolution` pixels (antialiased bicubic), then crop the centre square, as
    torchvision's transforms of these names do with Pillow."""
    short = min(image.size)
    width, height = (int(resolution * side / short) for side in image.size)
    left, top = round((width - resolution) / 2), round((height - resolution) / 2)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + resolution, top + resolution))


def resize_batch(images: np.ndarray, resolution: int | None) -> np.ndarray:
    """Apply `resize` to uint8 images (n, H, W, C); they come back untouched where they have that side already."""
    if resolution is None or images.shape[1:3] == (resolution, resolution):
        return images
    resized = np.empty((len(images), resolution, resolution, images.shape[3]), np.uint8)
    for row, image in zip(resized, images, strict=True):
        picture = Image.fromarray(image.squeeze(-1) if image.shape[2] == 1 else image)
        row[:] = np.atleast_3d(np.asarray(resize(picture, resolution)))
    return resized


def to_tensor(images: np.ndarray | torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 images (n, H, W, C) as float32 (n, C, H, W) in [-1, 1] on `device`."""
    import torch

    pixels = torch.as_tensor(images).to(device)
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous()


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Float images (n, C, H, W) in [-1, 1] as uint8 (n, H, W, C); values beyond the range are clipped."""
    pixels = images.clamp(-1, 1).add(1.0).mul(127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def undo_augment(images: Tensor, augmentation: Tensor) -> Tensor:
    """Inverse of `augment`."""
    import torch

    bits = augmentation[:, None, None, None]
    images = torch.where(bits // 4 == 1, images.transpose(2, 3), images)
    images = torch.where(bits // 2 % 2 == 1, images.flip(2), images)
    return torch.where(bits % 2 == 1, images.flip(3), images)


def augment(images: Tensor, augmentation: Tensor) -> Tensor:
    """Apply to each image (n, C, S, S) its symmetry of the square: int64 (n,); 0 none, 1 left-right, up to 7.

    The symmetry is told to the network too, so that it never shows in samples (Karras et al. 2020, sec. 2.2).
    """
    import torch

    bits = augmentation[:, None, None, None]
    images = torch.where(bits % 2 == 1, images.flip(3), images)
    images = torch.where(bits // 2 % 2 == 1, images.flip(2), images)
    return torch.where(bits // 4 == 1, images.transpose(2, 3), images)
