"""The denoiser: diffusers' U-Net behind EDM preconditioning, with the class's statistics as buffers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from fedfactory_ray.data.transforms import augment, undo_augment
from fedfactory_ray.generation.edm import SIGMA_DATA, CleanImage, Gaussian, Residual, c_in, c_noise, expand
from fedfactory_ray.settings.sections import GeneratorConfig

AUGMENTATIONS = {"none": 1, "flip": 2, "dihedral": 8}
# diffusers' sinusoidal embedding is made for time steps up to 1000.
TIME_SCALE = 250.0


class Norm(nn.GroupNorm):
    """Group norm that on GPUs computes in its input's dtype: its sums are float32 there anyway, and autocast would
    widen what flows through it, twice the traffic where that is the limit."""

    def forward(self, x: Tensor) -> Tensor:
        """See GroupNorm."""
        if x.device.type != "cuda":
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Denoiser(nn.Module):
    """D(x; sigma) for one class.

    Buffers: mean (C, H, W) and scale (), which standardise images in [-1, 1] to deviation SIGMA_DATA.
    """

    def __init__(self, config: GeneratorConfig, channels: int, resolution: int) -> None:
        super().__init__()
        config.check_resolution(resolution)
        levels = len(config.channels)
        attends = [level in config.attention_levels for level in range(levels)]
        self.patch = config.patch
        self.unet: Any = UNet2DModel(
            sample_size=resolution // config.patch,
            in_channels=channels * config.patch**2,
            out_channels=channels * config.patch**2,
            block_out_channels=config.channels,
            layers_per_block=config.layers_per_block,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            add_attention=bool(config.attention_levels),
            attention_head_dim=config.head_channels,
            norm_num_groups=config.norm_groups,
            dropout=config.dropout,
            num_class_embeds=AUGMENTATIONS[config.augment] if config.augment != "none" else None,
        )
        for module in self.unet.modules():
            if type(module) is nn.GroupNorm:
                module.__class__ = Norm
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)
        pixels = channels * resolution**2
        self.preconditioner: Residual | CleanImage | Gaussian
        if config.prediction == "gaussian":
            self.preconditioner = Gaussian(pixels, min(config.components, pixels))
        else:
            self.preconditioner = Residual() if config.prediction == "residual" else CleanImage()
        self.register_buffer("mean", torch.zeros(channels, resolution, resolution))
        self.register_buffer("scale", torch.ones(()))
        self.mean: Tensor
        self.scale: Tensor

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.mean.shape
        return channels, height, width

    @torch.no_grad()
    def fit_statistics(self, images: Tensor) -> None:
        """Take mean image, deviation and, where it is used, covariance from images (n, C, H, W) in [-1, 1]."""
        self.mean.copy_(images.mean(0))
        self.scale.copy_(((images - self.mean).square().mean().sqrt() / SIGMA_DATA).clamp(min=1e-3))
        if isinstance(self.preconditioner, Gaussian):
            self.preconditioner.fit(self.standardise(images))

    def standardise(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] → data of mean 0 and deviation SIGMA_DATA."""
        return (images - self.mean) / self.scale

    def restore(self, data: Tensor) -> Tensor:
        """Inverse of `standardise`."""
        return data * self.scale + self.mean

    def forward(self, x: Tensor, sigma: Tensor, augmentation: Tensor | None = None) -> Tensor:
        """Denoise x (n, C, H, W) = data + sigma · noise at levels sigma (n,); augmentation int64 (n,), 0 = none."""
        turned = augmentation
        if augmentation is None and self.unet.config.num_class_embeds:
            augmentation = torch.zeros(len(x), dtype=torch.long, device=x.device)
        patches = F.pixel_unshuffle(x * expand(c_in(sigma)), self.patch)
        patches = patches.to(self.unet.conv_in.weight.dtype)  # that of a network which draws: autocast casts elsewhere
        raw = self.unet(patches, c_noise(sigma) * TIME_SCALE, class_labels=augmentation).sample
        correction = F.pixel_shuffle(raw.float(), self.patch) * expand(self.preconditioner.c_out(sigma))
        with torch.autocast(x.device.type, enabled=False):
            if turned is None or not isinstance(self.preconditioner, Gaussian):
                return self.preconditioner.skip(x, sigma) + correction
            # The filter is that of upright images.
            return augment(self.preconditioner.skip(undo_augment(x, turned), sigma), turned) + correction

    def loss(self, data: Tensor, sigma: Tensor, noise: Tensor, augmentation: Tensor | None = None) -> Tensor:
        """Weighted squared error () of denoising data + sigma · noise (Karras et al. 2022, eq. 8)."""
        denoised = self(data + noise * expand(sigma), sigma, augmentation)
        return (expand(self.preconditioner.weight(sigma)) * (denoised - data).square()).mean()
