"""The typed configuration: one immutable tree, validated as a whole before anything starts.

`command_line` combines it from the defaults below, a preset, a YAML file and ``--dotted.overrides``.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from fedfactory_ray.sections import (
    ClassifierConfig,
    DataConfig,
    FederatedConfig,
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

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder; the same name again resumes it. Default: made from the configuration."""
    seed: int = Field(0, ge=0)
    """Seed of everything random."""
    baselines: tuple[Literal["centralised"], ...] = ("centralised",)
    """References beside the factory: `centralised` fits the same classifier on all real training images."""
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

    def determining(self) -> dict[str, Any]:
        """The settings that determine the factory's results, as JSON values: all but where things run and are kept, and
        but those of the baselines, whose results carry their own settings."""
        others = {"name", "storage", "tracking", "resources", "baselines", "federated"}
        tree = self.model_dump(mode="json", exclude=others)
        del tree["data"]["root"], tree["data"]["download"]
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
