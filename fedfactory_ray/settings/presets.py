"""Named starting points, each sized for the hardware in its description and honest about where it has been run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NOT_RUN = "published sizes, for GPUs; not yet run on its hardware"


@dataclass(frozen=True)
class Preset:
    """Settings that differ from the defaults; `verified` tells whether a whole run has been measured."""

    description: str
    values: dict[str, Any]
    verified: bool = False


# EDM as published (arXiv 2603.16370): a U-Net of about 50 M parameters and 25 M training images for each module.
PUBLISHED_GENERATOR = {
    "channels": (256, 256, 256),
    "layers_per_block": 3,
    "attention_levels": (1,),
    "head_channels": 64,
    "norm_groups": 32,
    "dropout": 0.1,
    "prediction": "residual",
    "augment": "flip",
    "epochs": 5000.0,
    "min_steps": 10_000,
    "max_steps": 100_000,
    "batch_size": 256,
    "learning_rate": 4e-4,
    "ema_decay": 0.9995,
    "noise_mean": -1.2,
}
PUBLISHED_SAMPLER = {"evaluations": 18, "sigma_min": 0.002, "sigma_max": 80.0, "compile": True}
PUBLISHED_CLASSIFIER = {
    "model": "resnet50",
    "norm": "batch",
    "epochs": 300,
    "batch_size": 256,
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "weight_decay": 5e-4,
    "label_smoothing": 0.1,
    "flips": "horizontal",
    "rotate": 0.0,
    "shift": 0.125,
    "scale": 0.0,
}


def _changed(sections: dict[str, dict[str, Any]], changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: values | changes.get(name, {}) for name, values in sections.items()}


def _published(source: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """The published sizes for `source`, with a section's fields changed."""
    sections: dict[str, dict[str, Any]] = {
        "data": {"source": source},
        "generator": PUBLISHED_GENERATOR,
        "sampler": PUBLISHED_SAMPLER,
        "synthesis": {"images_per_class": 10_000, "batch_size": 500, "unit_size": 1000},
        "classifier": PUBLISHED_CLASSIFIER,
        "storage": {"checkpoint_epochs": 20, "checkpoint_seconds": 300},
    }
    return _changed(sections, changes)


# For minutes on one GPU: a quarter of the pixels' cost by `patch`, the class's covariance for free by `prediction`.
ONE_GPU_GENERATOR = {
    "channels": (128, 256),
    "layers_per_block": 2,
    "patch": 2,
    "prediction": "gaussian",
    "epochs": 100.0,
    "min_steps": 1200,
    "max_steps": 2000,
    "batch_size": 128,
    "learning_rate": 1e-3,
    "ema_decay": 0.998,
}
ONE_GPU_CLASSIFIER = {
    "model": "resnet18",
    "norm": "batch",
    "epochs": 15,
    "batch_size": 256,
    "rotate": 0.0,
    "shift": 0.12,
    "contrast": 0.15,
    "tint": 0.1,
}


def _one_gpu(source: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """Sizes for some minutes on one GPU of 24 GB and more, with a section's fields changed."""
    sections: dict[str, dict[str, Any]] = {
        "data": {"source": source},
        "generator": ONE_GPU_GENERATOR,
        "sampler": {"evaluations": 18, "sigma_min": 0.002, "sigma_max": 80.0},
        "synthesis": {"images_per_class": 2000, "batch_size": 500, "unit_size": 1000},
        "classifier": ONE_GPU_CLASSIFIER,
        "storage": {"checkpoint_epochs": 15, "checkpoint_seconds": 300},
    }
    return _changed(sections, changes)


# Measured on two CPU cores: what undertrained generators need is the clean image as target, and a classifier that
# does not lean on texture and colour.
SMALL_GENERATOR = {
    "channels": (32, 64),
    "patch": 2,
    "prediction": "image",
    "epochs": 90.0,
    "min_steps": 600,
    "max_steps": 2400,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "ema_decay": 0.998,
}
SMALL_CLASSIFIER = {
    "norm": "batch",
    "epochs": 15,
    "flips": "dihedral",
    "shift": 0.12,
    "scale": 0.15,
    "rotate": 0.0,
    "contrast": 0.15,
    "tint": 0.1,
    "blur": 0.7,
    "noise": 0.375,
}


def _small(source: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """Sizes for two CPU cores and 28×28 images of `source`, with a section's fields changed."""
    sections: dict[str, dict[str, Any]] = {
        "data": {"source": source},
        "generator": SMALL_GENERATOR,
        "sampler": {"evaluations": 12, "sigma_max": 20.0},
        "synthesis": {"images_per_class": 1000},
        "classifier": SMALL_CLASSIFIER,
        "resources": {"classifier": {"threads": 2}},  # worth it from 28×28 on; 8×8 digits lose by it
    }
    return _changed(sections, changes)


# For classes of some tens of pictures, whose epochs alone would be too few steps, and of some thousand, whose would be
# an hour of them.
FOLDER_GENERATOR = SMALL_GENERATOR | {"prediction": "gaussian", "min_steps": 500, "max_steps": 1000}

PRESETS = {
    "digits": Preset("scikit-learn's handwritten digits, 10 silos; no download; two CPU cores", {}, verified=True),
    "retinamnist-cpu": Preset(
        "RetinaMNIST at 28×28, 5 silos; two CPU cores", _small("medmnist:retinamnist"), verified=True
    ),
    "breastmnist-cpu": Preset(
        "BreastMNIST at 28×28, 2 silos; two CPU cores", _small("medmnist:breastmnist"), verified=True
    ),
    "bloodmnist-cpu": Preset(
        "BloodMNIST at 28×28, 8 silos; two CPU cores, half an hour", _small("medmnist:bloodmnist"), verified=True
    ),
    "folder-cpu": Preset(
        "your folder of images, at 32×32: --data.source FOLDER, or ./images; a hundred to some thousand; two CPU cores",
        _small(
            "images",
            data={"resolution": 32},
            generator=FOLDER_GENERATOR,
            synthesis={"images_per_class": 500},
            classifier={"flips": "horizontal"},
        ),
        verified=True,
    ),
    "bloodmnist-1gpu": Preset(
        "BloodMNIST at 28×28, 8 silos; one GPU of 24 GB and more, minutes",
        _one_gpu("medmnist:bloodmnist", classifier={"flips": "dihedral", "scale": 0.15, "blur": 0.7, "noise": 0.375}),
    ),
    "cifar10-1gpu": Preset(
        "CIFAR-10, 10 silos; one GPU of 24 GB and more, minutes",
        _one_gpu(
            "cifar10",
            generator={"epochs": 20.0, "augment": "flip"},
            synthesis={"images_per_class": 5000},
            classifier={"flips": "horizontal", "blur": 0.5, "noise": 0.2},
        ),
    ),
    "retinamnist-published": Preset(f"RetinaMNIST at 28×28; {NOT_RUN}", _published("medmnist:retinamnist")),
    "bloodmnist-published": Preset(f"BloodMNIST at 28×28; {NOT_RUN}", _published("medmnist:bloodmnist")),
    "pathmnist-published": Preset(f"PathMNIST at 28×28; {NOT_RUN}", _published("medmnist:pathmnist")),
    "cifar10-published": Preset(f"CIFAR-10; {NOT_RUN}", _published("cifar10")),
    "isic2019-published": Preset(
        f"ISIC2019 at 128×128 from the folder ./isic2019 with train/ and test/; {NOT_RUN}",
        _published(
            "isic2019",
            data={"resolution": 128},
            generator={
                "channels": (128, 128, 256, 256, 384),
                "layers_per_block": 2,
                "attention_levels": (3,),
                "images_at_once": 32,
            },
            synthesis={"batch_size": 250},
        ),
    ),
}
