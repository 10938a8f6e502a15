"""Modules that a client exports: what belongs to one folder of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedfactory_ray.errors import RunConflictError, StorageError, TrainingDivergedError
from fedfactory_ray.pipeline.export import export_modules
from fedfactory_ray.settings.config import Config, merge
from fedfactory_ray.storage.checkpoints import Checkpoints

TINY = {"generator": {"channels": [8], "min_steps": 2, "max_steps": 2, "batch_size": 4}}


def export(folder: Path, stripes: Path, **changes: Any) -> str:
    out = io.StringIO()
    config = Config.model_validate(merge(TINY | {"data": {"source": str(stripes)}}, changes))
    export_modules(config, "north", str(folder), Console(file=out, width=200), classes=[1], device="cpu")
    return out.getvalue()


def test_only_data_and_generator_claim_the_folder(tmp_path: Path, stripes: Path) -> None:
    assert "1 of them trained now" in export(tmp_path, stripes)
    others = {"synthesis": {"images_per_class": 16}, "classifier": {"epochs": 1}, "sampler": {"evaluations": 4}}
    assert "0 of them trained now" in export(tmp_path, stripes, **others)
    with pytest.raises(RunConflictError, match=r"generator.batch_size: there 4, here 5[\s\S]*--out") as refusal:
        export(tmp_path, stripes, generator={"batch_size": 5})
    assert "--name" not in str(refusal.value)
    with pytest.raises(RunConflictError, match=r"data.resolution: there None, here 16"):
        export(tmp_path, stripes, data={"resolution": 16})


def test_folders_that_all_settings_claimed_go_on(tmp_path: Path, stripes: Path) -> None:
    export(tmp_path, stripes)
    claimed = tmp_path / "modules" / "north" / "config.json"
    everything = Config.model_validate(TINY).determining()
    claimed.write_text(json.dumps(everything | json.loads(claimed.read_text())))
    assert "0 of them trained now" in export(tmp_path, stripes, synthesis={"images_per_class": 16})


def test_a_training_that_diverges_is_refused_with_client_and_class(tmp_path: Path, stripes: Path) -> None:
    with pytest.raises(TrainingDivergedError, match=r"client 'north', class 1[\s\S]*lower generator\.learning_rate"):
        export(tmp_path, stripes, generator={"learning_rate": 1e30, "grad_clip": 1e30, "min_steps": 9, "max_steps": 9})


def test_checkpoints_stay_out_of_the_folder_that_travels(
    tmp_path: Path, stripes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    save = Checkpoints.save

    def note(self: Checkpoints, *arguments: Any) -> None:
        written.append(self.storage.uri)
        save(self, *arguments)

    monkeypatch.setattr(Checkpoints, "save", note)
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    generator = {"min_steps": 20, "max_steps": 20}
    earlier = out / "modules" / "north" / "class-001" / "checkpoints" / "x" / "training.safetensors"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("moments")
    export(out, stripes, generator=generator, storage={"scratch": str(scratch), "checkpoint_seconds": 1e-6})
    assert written
    assert all(uri.startswith(f"{scratch}/") for uri in written)
    assert [path for path in scratch.rglob("*") if path.is_file()] == []
    assert scratch.stat().st_mode & 0o077 == 0
    assert {path.name for path in out.rglob("*") if path.is_file()} == {"model.safetensors", "card.json", "config.json"}
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"storage\.scratch"):
        export(tmp_path / "other", stripes, storage={"scratch": str(tmp_path / "file" / "x")})
