"""A run's folder: the name of every file and folder in it. Whoever lists files imports this alone."""

from __future__ import annotations

import re

METHOD, PRODUCT, MIXTURE = "fedfactory", "product", "mixture"
"""Names in tables and logs: Architecture I's classifier, Architecture II's two ways to combine experts."""
CENTRALISED, LOCAL = "centralised", "local"
"""The classifier on all real images; each client's on its own."""

CARD, WEIGHTS = "card.json", "model.safetensors"
"""Files of an artefact's folder: what it is, written last; and its weights."""
DIVERGED = "diverged.json"
"""In the place of a module's card and weights: its training diverged, and the run goes on without it."""

SNAPSHOT = "training.safetensors"
"""The file of a checkpoint of a module's training."""
STATE, PROGRESS = "state.pt", "fit.json"
"""Files of a checkpoint of a fit, beside the best weights: what continues it; step, best epoch and history."""

CONFIG, SETTINGS = "config.json", "settings.json"
"""The settings that determine the run, which claim its folder; and the whole configuration of its last start."""
PARTITION, INDICES = "partition.json", "partition.parquet"
"""The partition's digest and counts; and who holds which training images."""
MANIFEST = "manifest.json"
"""The units of the synthetic data set, in order; written after all of them."""
EVALUATION, ENVIRONMENT, SECONDS = "evaluation.json", "environment.json", "seconds.json"
"""Scores; hardware and versions on which a start of the run ended; seconds of each phase."""
TABLE, PLOT = "comparison.json", "comparison.png"
"""What jobs/compare.py found."""
PENDING, FORGETTING, FORGOTTEN = "pending.json", "forgetting.json", "forgotten.json"
"""The request, in a run that is being made into one that forgets; what its successor goes on with, until it is
finished; and all that is left of a run which had to forget, beside CERTIFICATE, AUDIT and SETTINGS."""
LEASE, DOOR = "lease.json", "lease.door.json"
"""Who writes in the folder now; and who looks at the lease now."""
OUTBOX = "mlflow.jsonl"
"""What MLflow did not take yet; there only while something waits."""
CERTIFICATE, AUDIT = "certificate.json", "audit.jsonl"
"""How a request was fulfilled, in the successor; and a line for each request, in both runs."""
TRIAL, BEST_CONFIG = "trial.json", "best.yaml"
"""A trial's reports; a study's best configuration."""
FILES = frozenset(
    (
        *(CONFIG, SETTINGS, PARTITION, INDICES, MANIFEST, EVALUATION, ENVIRONMENT, SECONDS, TABLE, PLOT),
        *(PENDING, FORGETTING, CERTIFICATE, AUDIT, LEASE, OUTBOX),
    )
)
"""What may lie in a run's folder itself, beside the folders below."""

MODULES, SYNTHETIC, CLASSIFIERS, EXPERTS = "modules", "synthetic", "classifier", "experts"
FEDERATED, TUNE = "federated", "tune"
"""Checkpoints of federated methods; what Ray Tune keeps while a study runs."""
CHECKPOINTS = "checkpoints"
"""In the folder of what is still being made: what continues it."""
MODULE_CARD = re.compile(rf"{MODULES}/(?P<client>[^/]+)/class-(?P<label>[0-9]{{3,9}})/{re.escape(CARD)}")

EXPERT_CARD = re.compile(rf"{EXPERTS}/(?P<client>[^/]+)/{re.escape(CARD)}")


def module_folder(client: str, label: int) -> str:
    """Where a client's module of a class lies."""
    return f"{MODULES}/{client}/class-{label:03d}"


def unit_file(client: str, label: int, index: int) -> str:
    """The Parquet file of a unit of synthetic images."""
    return f"{SYNTHETIC}/class-{label:03d}/{client}-{index:05d}.parquet"


def classifier_folder(name: str) -> str:
    """Where a classifier lies: the factory's, the reference, or a federated method's."""
    return f"{CLASSIFIERS}/{name}"


def lone_classifier(client: str) -> str:
    """Name of the classifier that a client fitted on its own images alone."""
    return f"{LOCAL}-{client}"


def expert_folder(client: str) -> str:
    """Where a client's expert lies."""
    return f"{EXPERTS}/{client}"


def method_folder(name: str) -> str:
    """Where a federated method's checkpoints lie while it runs."""
    return f"{FEDERATED}/{name}"


def checkpoints_folder(folder: str) -> str:
    """Where the checkpoints of what becomes the artefact in `folder` lie."""
    return f"{folder}/{CHECKPOINTS}"


def checkpoint_folder(folder: str, step: int) -> str:
    """Where the checkpoint after `step` lies; in the order of names, the newest comes last."""
    return f"{folder}/{step:08d}"


def trainer_folder(name: str, fingerprint: str) -> str:
    """Where Ray Train keeps checkpoints of a classifier's fit."""
    return f"train-{name}-{fingerprint[:16]}"


def message_file(name: str) -> str:
    """A message of the server of a federated method, in a checkpoint."""
    return f"{name}.safetensors"


def state_file(client: str) -> str:
    """What a client of a federated method keeps between rounds, in a checkpoint."""
    return f"client-{client}.safetensors"


def study_name(method: str, run: str) -> str:
    """Name of the study that tunes a method on the data of a run."""
    return f"tune-{method}-{run}"


def trial_folder(settings: str) -> str:
    """Where a study keeps a trial of these settings, by their short name."""
    return f"trial-{settings}"


def shared_folder(kind: str, settings: str) -> str:
    """Where a study keeps what trials share, `modules` or `images`, by the short name of the settings."""
    return f"{kind}-{settings}"


def retrained_folder(token: str) -> str:
    """Where a run is made again, for a comparison."""
    return f"retrain-{token}"
