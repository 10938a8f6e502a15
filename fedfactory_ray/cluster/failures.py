"""Failures: what actors and tasks raised, inside Ray's wrappings; lack of memory and divergence as refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import RayError

from fedfactory_ray.errors import FedFactoryError, GpuMemoryError, TrainingDivergedError

WRAPPINGS = ("cause", "controller_failure", "_base_exc")
"""Where Ray's exceptions keep the one that they wrap: a task's, and Ray Train's of its controller and its workers."""


def reason(error: RayError) -> str:
    """One line that tells why an actor or its task failed."""
    cause = getattr(error, "cause", None) or error
    first, *_ = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {first}"


def find_refusal(error: BaseException | None) -> FedFactoryError | None:
    """The refusal of a task, an actor or Ray Train inside Ray's wrappings of it, if there is one."""
    while error is not None:
        if isinstance(error, FedFactoryError) and not isinstance(error, RayError):
            return error
        wrapped = (getattr(error, name, None) for name in WRAPPINGS)
        error = next((inner for inner in wrapped if inner is not None), error.__cause__)
    return None


@contextmanager
def failures_refused(who: str, remedy: str) -> Iterator[None]:
    """Raise GpuMemoryError in the place of torch's, telling `who` computed what, and what mends it; and
    TrainingDivergedError in the place of a FloatingPointError, which tells itself what mends it."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        found, *_ = str(error).strip().splitlines() or ["no message"]
        raise GpuMemoryError(who, found, remedy) from error
    except FloatingPointError as error:
        raise TrainingDivergedError(who, str(error)) from error
