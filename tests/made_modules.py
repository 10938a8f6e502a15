"""A module as a client's files, made without training: what travels between organisations."""

from __future__ import annotations

from pathlib import Path

import torch

from fedfactory_ray.generation import module
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.generation.unet import Denoiser
from fedfactory_ray.settings.sections import GeneratorConfig
from fedfactory_ray.storage.artefact import keep
from fedfactory_ray.storage.files import Storage

GENERATOR = GeneratorConfig(channels=(8,))


def write_module(folder: Path, client: str, label: int) -> Path:
    """Write a module of grey images of 8 pixels a side below `folder`; returns its own folder."""
    torch.manual_seed(label)
    weights = module.pack(Denoiser(GENERATOR, 1, 8), half=True)
    settings, files = GENERATOR.model_dump(mode="json"), {"model.safetensors": module.digest(weights)}
    card = ModuleCard(client, label, 5, 1, 8, 10, "fp32", settings, len(weights), files=files)
    storage = Storage(str(folder))
    storage.write(f"{card.folder}/model.safetensors", weights)
    keep(storage, card)
    return folder / card.folder
