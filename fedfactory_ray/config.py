"""The typed configuration: one immutable tree, validated as a whole before anything starts.

`command_line` combines it from the defaults below, a preset, a YAML file and ``--dotted.overrides``.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from fedfactory_ray.sections import (
    NAME,
    ClassifierConfig,
    DataConfig,
    GeneratorConfig,
    PartitionConfig,
    ResourcesConfig,
    SamplerConfig,
    StorageConfig,
    SynthesisConfig,
    TrackingConfig,
)


class Config(BaseSettings):
    """One run of FederatedFactory. The defaults are the preset `digits`."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        cli_avoid_json=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_exit_on_error=True,
    )

    name: str | None = Field(None, pattern=NAME)
    """Name of the run and of its folder; the same name again resumes it. Default: made from the configuration."""
    seed: int = Field(0, ge=0)
    """Seed of everything random."""
    baselines: tuple[Literal["centralised", "none"], ...] = ()
    """References beside the factory: `centralised` fits the same classifier on all real training images; `none`.
    Default: `centralised`, unless no one may read all the images (partition `natural`, modules from files)."""
    modules: str | None = None
    """Folder of modules that were trained elsewhere with jobs/train_client.py; then no client trains here."""
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
        return self

    def data_of(self, client: str) -> DataConfig:
        """Where a client's images come from."""
        for silo in self.partition.silos:
            if silo.name == client:
                return self.data.model_copy(update={"source": silo.source})
        return self.data

    def determining(self) -> dict[str, Any]:
        """The settings that determine the results, as JSON values: all but where things run and are kept."""
        tree = self.model_dump(
            mode="json", exclude={"name", "storage", "tracking", "resources", "baselines", "modules"}
        )
        del tree["data"]["root"], tree["data"]["download"]
        for silo in tree["partition"]["silos"]:
            del silo["resources"], silo["labels"]
        threads = {name: getattr(self.resources, name).threads for name in ("client", "synthesis", "classifier")}
        tree["resources"] = {"classifier_workers": self.resources.classifier_workers, "threads": threads}
        return tree


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `section.field` → value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, section by section."""
    both = {k: merge(base[k], v) for k, v in changes.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | changes | both
