"""What results depend on beside the config is found, or said not to be there; on CUDA only what repeats is allowed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from fedfactory_ray.cluster import environment as module
from fedfactory_ray.cluster.devices import prepare_process
from fedfactory_ray.cluster.environment import environment, sources_sha256

CPU = torch.device("cpu")


def test_it_tells_what_chooses_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    prepare_process(1, CPU)
    found = environment(CPU)
    assert found["MKL_CBWR"] == "COMPATIBLE"
    assert "ONEDNN_MAX_CPU_ISA" not in found
    assert found["determinism"] == "warn"
    assert found["cpu capability"] == torch.backends.cpu.get_cpu_capability()
    assert found["scikit-learn version"] == version("scikit-learn")
    assert "gpu" not in found


def test_a_package_that_is_not_installed_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str) -> str:
        if name == "fedfactory-ray":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(module, "version", nowhere)
    assert environment(CPU)["fedfactory-ray version"] == "not installed"


def test_other_sources_have_another_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment(CPU)["fedfactory-ray sources"] == sources_sha256()

    def digest(**files: str) -> str:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        (root / "inner").mkdir(parents=True)
        for name, text in files.items():
            (root / "inner" / f"{name}.py").write_text(text)
        (root / "notes.txt").write_text(root.name)
        monkeypatch.setattr(module, "PACKAGE", root)
        return sources_sha256.__wrapped__()

    assert digest(a="1", b="2") == digest(b="2", a="1")
    assert len({digest(a="1", b="2"), digest(a="1", b="3"), digest(a="1", c="2"), digest(a="2", b="1")}) == 4


def test_on_cuda_what_may_differ_from_run_to_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    try:
        prepare_process(1, torch.device("cuda", 0))
        assert environment(CPU)["determinism"] == "error"
    finally:
        prepare_process(1, CPU)
    assert environment(CPU)["determinism"] == "warn"
