"""How MLflow loads a logged classifier. The file travels with every model, which so needs torch and MLflow alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from mlflow.environment_variables import MLFLOW_DEFAULT_PREDICTION_DEVICE
from torch.export.passes import move_to_device_pass

BATCH_SIZE = 500


class ServedClassifier:
    """A classifier behind `mlflow.pyfunc`, on one device."""

    def __init__(self, classify: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
        self.classify, self.device = classify, device

    @torch.inference_mode()
    def predict(self, images: np.ndarray) -> np.ndarray:
        """Probabilities float32 (n, classes), their rows summing to 1, of uint8 images (n, H, W, C)."""
        batches = torch.from_numpy(images).split(BATCH_SIZE)
        return torch.cat([self.classify(batch.to(self.device)).cpu() for batch in batches]).numpy()


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> ServedClassifier:
    """MLflow's hook. Device: that of `model_config`, else MLFLOW_DEFAULT_PREDICTION_DEVICE, else CUDA, else the CPU."""
    asked = (model_config or {}).get("device") or MLFLOW_DEFAULT_PREDICTION_DEVICE.get()
    chosen = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    program = move_to_device_pass(torch.export.load(path), chosen)
    return ServedClassifier(program.module(), torch.device(chosen))
