"""How MLflow loads a logged classifier. The file travels with every model, which so needs torch and MLflow alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.environment_variables import MLFLOW_DEFAULT_PREDICTION_DEVICE
from mlflow.types import ParamSchema, ParamSpec
from torch.export.passes import move_to_device_pass

BATCH_SIZE = 500
NAMES, PRIOR = "class_names.json", "prior.json"
"""In the program's file: the names of the classes, in order; and the prior that the clients' counts announce."""
PARAMS = ParamSchema([ParamSpec("prior", "string", "announced"), ParamSpec("prevalence", "double", [], (-1,))])
"""What `predict` takes beside images. MLflow gives each parameter one type, so a list has a name of its own."""


class ServedClassifier:
    """A classifier behind `mlflow.pyfunc`, on one device. `classify` gives log-probabilities with the classes alike;
    `announced` are the classes' shares that the clients declared."""

    def __init__(
        self,
        classify: Callable[[torch.Tensor], torch.Tensor],
        class_names: list[str],
        announced: list[float],
        device: torch.device,
    ) -> None:
        self.classify, self.class_names, self.announced, self.device = classify, class_names, announced, device

    @torch.inference_mode()
    def predict(self, images: np.ndarray, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Probabilities float32 (n, classes), a column a class by its name, of uint8 images (n, H, W, C).

        The columns are in the classes' order; rows sum to 1. `params` tell how frequent the classes are where the
        images come from: {"prior": "announced"}, as the clients declared, which is the default; {"prior": "uniform"},
        all alike; or {"prevalence": [p_0, …]}, as you know them, up to a common factor. Raises ValueError for others.
        """
        logarithm = torch.tensor(self.prior(params or {}), dtype=torch.float64).log()
        batches = torch.from_numpy(images).split(BATCH_SIZE)
        logits = torch.cat([self.classify(batch.to(self.device)).cpu() for batch in batches])
        rows = (logits.double() + logarithm).softmax(1).float()
        return pd.DataFrame(rows.numpy(), columns=self.class_names)

    def prior(self, params: Mapping[str, Any]) -> list[float]:
        """The classes' prior that `params` ask for."""
        name, given = params.get("prior", "announced"), [float(p) for p in params.get("prevalence", [])]
        if name not in ("announced", "uniform"):
            raise ValueError(f"prior {name!r}: needed announced or uniform, or prevalence=[…] in its place")
        if not given:
            return self.announced if name == "announced" else [1.0] * len(self.class_names)
        if name == "uniform":
            raise ValueError("prior 'uniform' and a prevalence: needed one of them")
        if len(given) != len(self.class_names) or not all(0 <= p < math.inf for p in given) or not any(given):
            raise ValueError(
                f"prevalence {given}: needed {len(self.class_names)} shares, none negative, in the order of the "
                f"classes {', '.join(self.class_names)}"
            )
        return given


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> ServedClassifier:
    """MLflow's hook. Device: that of `model_config`, else MLFLOW_DEFAULT_PREDICTION_DEVICE, else CUDA, else the CPU."""
    asked = (model_config or {}).get("device") or MLFLOW_DEFAULT_PREDICTION_DEVICE.get()
    chosen = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    beside = {NAMES: "", PRIOR: ""}
    program = move_to_device_pass(torch.export.load(path, extra_files=beside), chosen)
    names, announced = (json.loads(beside[file]) for file in (NAMES, PRIOR))
    return ServedClassifier(program.module(), names, announced, torch.device(chosen))
