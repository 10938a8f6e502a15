"""How MLflow loads a logged classifier. The file travels with every model, which so needs torch and MLflow alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.environment_variables import MLFLOW_DEFAULT_PREDICTION_DEVICE
from torch.export.passes import move_to_device_pass

BATCH_SIZE = 500
NAMES = "class_names.json"
"""In the program's file: the names of the classes, in order."""


class ServedClassifier:
    """A classifier behind `mlflow.pyfunc`, on one device."""

    def __init__(
        self, classify: Callable[[torch.Tensor], torch.Tensor], class_names: list[str], device: torch.device
    ) -> None:
        self.classify, self.class_names, self.device = classify, class_names, device

    @torch.inference_mode()
    def predict(self, images: np.ndarray) -> pd.DataFrame:
        """Probabilities float32 (n, classes), a column a class by its name, of uint8 images (n, H, W, C).

        The columns are in the classes' order; rows sum to 1.
        """
        batches = torch.from_numpy(images).split(BATCH_SIZE)
        rows = torch.cat([self.classify(batch.to(self.device)).cpu() for batch in batches])
        return pd.DataFrame(rows.numpy(), columns=self.class_names)


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> ServedClassifier:
    """MLflow's hook. Device: that of `model_config`, else MLFLOW_DEFAULT_PREDICTION_DEVICE, else CUDA, else the CPU."""
    asked = (model_config or {}).get("device") or MLFLOW_DEFAULT_PREDICTION_DEVICE.get()
    chosen = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    beside = {NAMES: ""}
    program = move_to_device_pass(torch.export.load(path, extra_files=beside), chosen)
    return ServedClassifier(program.module(), json.loads(beside[NAMES]), torch.device(chosen))
