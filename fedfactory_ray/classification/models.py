"""Classifier networks for small images."""

from __future__ import annotations

from functools import partial

from torch import nn

from fedfactory_ray.classification.fast import FastNetwork
from fedfactory_ray.data.source import Task
from fedfactory_ray.settings.sections import Flips, Norm


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """`batch`: Ioffe and Szegedy 2015; `group`: Wu and He 2018, up to 32 groups of four or more channels.

    Batch statistics of clients with different classes have no common mean, so they break federated averaging (Hsieh et
    al. 2020, sec. 5); a group norm has none.
    """
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(min(32, channels // 4), channels)


def conv_block(inputs: int, outputs: int, norm: Norm) -> nn.Sequential:
    """3×3 convolution, normalisation, ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), make_norm(norm, outputs), nn.ReLU())


def small_cnn(channels: int, classes: int, norm: Norm) -> nn.Module:
    """Six convolutions over three scales, 288 k parameters: for CPUs and images of 8 to 64 pixels."""
    return nn.Sequential(
        *(conv_block(channels, 32, norm), conv_block(32, 32, norm), nn.MaxPool2d(2)),
        *(conv_block(32, 64, norm), conv_block(64, 64, norm), nn.MaxPool2d(2)),
        *(conv_block(64, 128, norm), conv_block(128, 128, norm)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, classes)),
    )


def small_image_resnet(name: str, channels: int, classes: int, resolution: int, norm: Norm) -> nn.Module:
    """torchvision's ResNet-18 or -50 (He et al. 2016); up to 64 pixels its stem is a 3×3 convolution without pooling,
    as the paper has it for CIFAR-10."""
    from torchvision.models import resnet18, resnet50

    network = {"resnet18": resnet18, "resnet50": resnet50}[name](
        weights=None, num_classes=classes, norm_layer=partial(make_norm, norm)
    )
    if resolution <= 64:
        network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif channels != 3:
        network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return network


def make_classifier(name: str, task: Task, norm: Norm = "group", flips: Flips = "none") -> nn.Module:
    """An untrained network: float images (n, channels, side, side) in [-1, 1] to logits (n, classes). `flips` are the
    symmetries that leave an image's class as it is."""
    if name == "cnn":
        return small_cnn(task.channels, task.classes, norm)
    if name == "fast":
        mirrored = flips != "none"
        return FastNetwork(task.channels, task.classes, task.resolution, partial(make_norm, norm), mirrored=mirrored)
    return small_image_resnet(name, task.channels, task.classes, task.resolution, norm)
