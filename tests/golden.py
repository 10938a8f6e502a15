"""Digests of three small runs on handwritten digits that no refactoring may change, kept for each kind of machine.

    python tests/golden.py        adds those of this machine to tests/golden.json, or replaces them

Bytes depend on processor and torch version, so digests are kept by both, and a machine of another kind has none.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedfactory_ray.cluster.environment import environment
from fedfactory_ray.comparison.compare import compare
from fedfactory_ray.pipeline import phases
from fedfactory_ray.settings.command_line import stored_config
from fedfactory_ray.settings.config import Config
from fedfactory_ray.unlearning.forget import forget

FILE = Path(__file__).with_suffix(".json")
OUT = Console(file=io.StringIO())
SMALL: dict[str, Any] = {
    "baselines": ["none"],
    "generator": {"channels": [8, 16], "min_steps": 8, "max_steps": 8, "batch_size": 16, "augment": "flip"},
    "sampler": {"evaluations": 4},
    "synthesis": {"images_per_class": 24, "batch_size": 8, "unit_size": 8},
    "classifier": {"epochs": 2, "batch_size": 16},
    "federated": {"rounds": 2, "local_epochs": 1},
    # Bytes do not depend on it, and every actor imports for seconds.
    "resources": {"max_actors": 1},
}


def machine() -> str:
    """What bytes depend on: the processor and the version of torch."""
    return f"{environment(torch.device('cpu'))['processor']}, torch {torch.__version__.partition('+')[0]}"


def make(folder: Path) -> dict[str, dict[str, str]]:
    """Make the runs in `folder`; returns the digests of each."""
    places = {"storage": {"uri": f"{folder}/runs"}, "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"}}

    def config(**changes: Any) -> Config:
        return Config.model_validate(SMALL | places | changes)

    phases.run(config(name="silos", architecture="both"), OUT)
    found = {"silos, both architectures": digests(folder / "runs" / "silos")}
    forget(
        stored_config("silos", ["--storage.uri", f"{folder}/runs"]),
        ["client-003"],
        [],
        OUT,
        asked_by="x",
        successor="less",
    )
    found["silos, less client-003"] = digests(folder / "runs" / "less")
    # Of its 24 shares 10 are of fewer images than train a module by default.
    generator = SMALL["generator"] | {"min_images": 1}
    partition = {"scheme": "dirichlet", "clients": 3, "alpha": 0.3}
    dirichlet = config(name="dirichlet", partition=partition, generator=generator)
    compare(dirichlet, ["fedfactory", "local", "scaffold"], 1, OUT)
    found["dirichlet, compared"] = digests(folder / "runs" / "dirichlet")
    return found


def digests(run: Path) -> dict[str, str]:
    """SHA-256 of all weights, of every unit's rows, of predictions, and of the partition."""
    found = {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("model.safetensors"))
    }
    found |= {shard["file"]: shard["rows_sha256"] for shard in json.loads((run / "manifest.json").read_text())}
    if (run / "evaluation.json").exists():
        predictions = json.loads((run / "evaluation.json").read_text())["predictions_sha256"]
        found |= {f"predictions, {name}": digest for name, digest in predictions.items()}
    return found | {"partition": json.loads((run / "partition.json").read_text())["sha256"]}


def known() -> dict[str, dict[str, dict[str, str]]]:
    """The digests that are kept, by machine and run."""
    return dict(json.loads(FILE.read_text())) if FILE.exists() else {}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        made = make(Path(scratch))
    FILE.write_text(json.dumps(known() | {machine(): made}, indent=1, sort_keys=True) + "\n")
    sys.stdout.write(f"{sum(map(len, made.values()))} digests of {machine()}: {FILE}\n")
