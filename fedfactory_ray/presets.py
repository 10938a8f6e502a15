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
    "channels": (128, 256, 256),
    "layers_per_block": 3,
    "attention_levels": (1,),
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
PUBLISHED_SAMPLER = {"evaluations": 18, "sigma_min": 0.002, "sigma_max": 80.0}
PUBLISHED_CLASSIFIER = {
    "model": "resnet50",
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
    "checkpoint_every": 20,
}


def _published(source: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """The published sizes for `source`, with a section's fields changed."""
    sections: dict[str, dict[str, Any]] = {
        "data": {"source": source},
        "generator": PUBLISHED_GENERATOR,
        "sampler": PUBLISHED_SAMPLER,
        "synthesis": {"images_per_class": 10_000, "batch_size": 500, "unit_size": 1000},
        "classifier": PUBLISHED_CLASSIFIER,
    }
    return {name: values | changes.get(name, {}) for name, values in sections.items()}


PRESETS = {
    "digits": Preset("scikit-learn's handwritten digits, 10 silos; no download; two CPU cores", {}, verified=True),
}
