"""The typed configuration: one immutable tree, validated as a whole before anything starts.

`command_line` combines it from the defaults below, a preset, a YAML file and ``--dotted.overrides``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from fedfactory_ray.settings.data import NAME, DataConfig, PartitionConfig
from fedfactory_ray.settings.places import ResourcesConfig, StorageConfig, TrackingConfig
from fedfactory_ray.settings.sections import (
    ClassifierConfig,
    ExpertsConfig,
    FederatedConfig,
    GeneratorConfig,
    SamplerConfig,
    SynthesisConfig,
    refuse_truth,
)
from fedfactory_ray.storage.layout import METHOD, PRODUCT


class Config(BaseSettings):
    """One run of FederatedFactory. The defaults are the preset `digits`."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        cli_avoid_json=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_exit_on_error=True,
    )

    _is_no_truth = field_validator("*", mode="before")(refuse_truth)

    name: str | None = Field(None, pattern=NAME)
    """Name of the run and of its folder; the same name again resumes it. Default: made from the configuration."""
    seed: int = Field(0, ge=0)
    """Seed of everything random."""
    architecture: Literal["centralised", "decentralised", "both"] = "centralised"
    """`centralised`: one classifier, fitted on synthetic images alone; `decentralised`: an expert a client, fitted
    there on its real and on synthetic images, and the product of all experts; `both`, from the same modules."""
    baselines: tuple[Literal["centralised", "none"], ...] = ()
    """References beside the factory: `centralised` fits the same classifier on all real training images; `none`.
    Default: `centralised`, unless no one may read all the images (partition `natural`, modules from files)."""
    modules: str | None = None
    """Folder of modules that were trained elsewhere with jobs/train_client.py; then no client trains here."""
    folder: str | None = None
    """Where relative paths were made absolute from. Set by the command line: the folder in which it was typed."""
    take_over: bool = Field(False, exclude=True)
    """Take the run's folder from another start that is still at work there, on any host: it stops at its next
    heartbeat. One that was killed needs no such order. Never stored."""
    data: DataConfig = DataConfig()
    """Images."""
    partition: PartitionConfig = PartitionConfig()
    """Clients."""
    generator: GeneratorConfig = GeneratorConfig()
    """Modules."""
    sampler: SamplerConfig = SamplerConfig()
    """Sampling."""
    synthesis: SynthesisConfig = SynthesisConfig()
    """Synthetic images."""
    classifier: ClassifierConfig = ClassifierConfig()
    """Classifier."""
    experts: ExpertsConfig = ExpertsConfig()
    """Experts."""
    federated: FederatedConfig = FederatedConfig()
    """Federated baselines (jobs/compare.py)."""
    resources: ResourcesConfig = ResourcesConfig()
    """Resources."""
    storage: StorageConfig = StorageConfig()
    """Storage."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""

    @classmethod
    def settings_customise_sources(cls, settings_cls: Any, init_settings: Any, *_: Any, **__: Any) -> tuple[Any, ...]:
        """Read no environment variables: a run is a function of its command line and files."""
        return (init_settings,)

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Config:
        if self.data.known_resolution is not None:
            self.generator.check_resolution(self.data.known_resolution)
        if self.classifier.batch_size % self.resources.classifier_workers:
            raise ValueError(
                f"classifier.batch_size={self.classifier.batch_size} needs to be a multiple of "
                f"resources.classifier_workers={self.resources.classifier_workers}"
            )
        return self

    @property
    def apart(self) -> bool:
        """Whether no one place may read all training images."""
        return self.modules is not None or self.partition.scheme == "natural"

    @property
    def shows_real(self) -> bool:
        """Whether real images may be seen in MLflow."""
        asked = self.tracking.real_images
        return asked == "shown" or (asked == "auto" and not self.apart)

    @property
    def references(self) -> tuple[str, ...]:
        """The baselines to fit."""
        chosen = self.baselines or (() if self.apart else ("centralised",))
        return tuple(name for name in chosen if name != "none")

    @model_validator(mode="after")
    def _silos_are_not_pooled(self) -> Config:
        if self.apart and self.references:
            raise ValueError(
                f"baselines {list(self.references)} with "
                f"{'modules from files' if self.modules else 'partition natural'}: they need all training images in "
                "one place; leave baselines out"
            )
        if self.modules is not None and self.architecture != "centralised":
            raise ValueError(
                f"architecture={self.architecture} with modules from files: an expert is fitted where its client's "
                "real images are; needed architecture=centralised, or a cluster of the clients (partition natural)"
            )
        return self

    def with_class_names(self, names: Sequence[str]) -> Config:
        """The same, every source opened by the class names that all agree on."""
        return self.model_copy(update={"data": self.data.model_copy(update={"class_names": tuple(names)})})

    def data_of(self, client: str) -> DataConfig:
        """Where a client's images come from. A silo that holds only some of the classes would number them anew, so its
        source is not told before the names are agreed on."""
        for silo in self.partition.silos:
            if silo.name == client:
                if self.data.class_names is None:
                    raise ValueError(f"the source of {client!r} without class names: needed config.with_class_names")
                return self.data.model_copy(update={"source": silo.source})
        return self.data

    @property
    def main_method(self) -> str:
        """The method that the run is about, among its evaluations."""
        return PRODUCT if self.architecture == "decentralised" else METHOD

    def typed(self, path: str) -> str:
        """A path as it was typed in `folder`."""
        return path.removeprefix(os.path.join(self.folder, "")) if self.folder else path

    def determining(self) -> dict[str, Any]:
        """The settings that determine what the run makes, as JSON values: all but where things run and are kept.

        Neither `architecture`, `experts` nor the baselines count: they add to a run and change nothing that is there.
        Paths count as they were typed: a submitted job's folder has another name after each edit.
        """
        chosen = {"architecture", "experts", "baselines", "federated", "modules"}
        tree = self.model_dump(mode="json", exclude={"name", "folder", "storage", "tracking", "resources", *chosen})
        tree |= {name: getattr(self, name).determining() for name in ("data", "generator", "sampler")}
        # Class names determine which images a class has, and these count by their bytes.
        for name in ("root", "download", "class_names"):
            tree["data"].pop(name, None)
        tree["data"]["source"] = self.typed(self.data.source)
        if not self.partition.exclude:
            del tree["partition"]["exclude"]
        for silo in tree["partition"]["silos"]:
            del silo["resources"], silo["labels"]
            silo["source"] = self.typed(silo["source"])
        threads = {name: getattr(self.resources, name).threads for name in ("client", "synthesis", "classifier")}
        tree["resources"] = {"classifier_workers": self.resources.classifier_workers, "threads": threads}
        return tree


MOVED = {
    "classifier.checkpoint_every": "storage.checkpoint_epochs",
    "classifier.in_memory_mb": "resources.in_memory_mb",
    "federated.checkpoint_every": "storage.checkpoint_rounds",
}
"""Settings that have other names now, in stored runs, in people's files and commands: old name → name."""


def upgraded(tree: dict[str, Any]) -> dict[str, Any]:
    """Settings by today's names."""
    for old, new in MOVED.items():
        section, _, field = old.partition(".")
        if isinstance(tree.get(section), dict) and field in tree[section]:
            left = {name: value for name, value in tree[section].items() if name != field}
            tree = merge(tree | {section: left}, nested({new: tree[section][field]}))
    return tree


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `section.field` → value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        for part in reversed(name.split(".")):
            value = {part: value}
        tree = merge(tree, value)
    return tree


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, section by section."""
    both = {k: merge(base[k], v) for k, v in changes.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | changes | both
