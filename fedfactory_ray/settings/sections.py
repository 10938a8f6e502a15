"""The sections of the configuration, one for each part of a run; each refuses what cannot work by itself."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Norm = Literal["group", "batch"]
Flips = Literal["none", "horizontal", "dihedral"]

MOST_LEVELS, MOST_CHANNELS = 8, 4096
"""Of a generator's network, at most: more is a slip of the pen, or somebody who wants to fill the memory."""


def refuse_truth(cls: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """The value of a field, as it is. Raises ValueError for true or false where a number or text is needed: pydantic
    would take them for 1 and 0."""
    kind = cls.model_fields[str(info.field_name)].annotation
    if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
        raise ValueError(f"needed no truth value, which would count as {int(value)}")
    return value


class Section(BaseModel):
    """Base of all sections: frozen, and no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
    added: ClassVar[frozenset[str]] = frozenset()
    """Fields that came later; by default they change nothing of what versions without them made."""

    _is_no_truth = field_validator("*", mode="before")(refuse_truth)

    def determining(self) -> dict[str, Any]:
        """All fields as JSON values, those that came later only where they are not at their default: what was stored
        before stays found."""
        fields, tree = type(self).model_fields, self.model_dump(mode="json")
        return {name: value for name, value in tree.items() if name not in self.added or value != fields[name].default}


class GeneratorConfig(Section):
    """The generative module of one class: a diffusers UNet2DModel under EDM (Karras et al. 2022)."""

    added = frozenset({"head_channels", "images_at_once", "min_images"})

    channels: tuple[int, ...] = (16, 32)
    """Channels of each level; the resolution halves between levels."""
    layers_per_block: int = Field(1, ge=1, le=16)
    """Residual blocks a level."""
    attention_levels: tuple[int, ...] = ()
    """Levels (0 = finest) whose blocks attend over all positions."""
    head_channels: int = Field(8, ge=1)
    """Channels of an attention head; 64 in EDM, and faster on GPUs. Every attending level's must be a multiple."""
    patch: int = Field(1, ge=1, le=64)
    """Pixel-unshuffle factor before the U-Net: 2 quarters its cost."""
    norm_groups: int = Field(8, ge=1)
    """Groups of each group norm; every entry of `channels` must be a multiple."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout inside the residual blocks."""
    prediction: Literal["residual", "image", "gaussian"] = "residual"
    """What the network predicts: EDM's residual (long training), the clean image (short training), or the
    correction to the optimal linear denoiser of the class (short training)."""
    components: int = Field(128, ge=1)
    """`gaussian` only: principal components kept of the class's covariance."""
    augment: Literal["none", "flip", "dihedral"] = "none"
    """Augmentation; the network is told which one it sees, so that samples never show it."""
    epochs: float = Field(60.0, gt=0)
    """Passes over the class's images: the length of training follows the class's size..."""
    min_steps: int = Field(150, ge=1)
    """...but is at least this many optimiser steps..."""
    max_steps: int = Field(150, ge=1)
    """...and at most this many."""
    batch_size: int = Field(64, ge=1)
    """Images an optimiser step."""
    images_at_once: int | None = Field(None, ge=1)
    """Images that pass through the network at once, gradients summed, where memory is short; default: the batch."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak of AdamW's learning rate: linear warm-up, then cosine to 0."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps spent on warm-up."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    ema_decay: float = Field(0.995, ge=0, lt=1)
    """Decay a step of the averaged weights that make the module; ramps up from 0."""
    noise_mean: float = -0.8
    """Mean of ln(sigma) in training (P_mean of EDM); -1.2 in the paper."""
    noise_std: float = Field(1.2, gt=0)
    """Standard deviation of ln(sigma) in training (P_std of EDM)."""
    precision: Precision = "auto"
    """Arithmetic of training and sampling; auto: bf16 where the hardware has it, else fp32."""
    half_precision_upload: bool = True
    """Store and send weights as float16: half the bytes."""
    min_images: int = Field(20, ge=1)
    """Smallest number of a client's images of a class that trains a module: of fewer it would be a copy. They stay at
    home, where its expert and the baselines use them. Modules from files of fewer images are refused."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> GeneratorConfig:
        if not self.channels or any(c % self.norm_groups for c in self.channels):
            raise ValueError(f"channels {self.channels}: each needs to be a multiple of norm_groups={self.norm_groups}")
        if len(self.channels) > MOST_LEVELS or max(self.channels) > MOST_CHANNELS or min(self.channels) < 1:
            raise ValueError(
                f"channels {self.channels}: needed at most {MOST_LEVELS} levels of 1 to {MOST_CHANNELS} channels"
            )
        if self.min_steps > self.max_steps:
            raise ValueError(f"min_steps={self.min_steps} is above max_steps={self.max_steps}")
        if any(level not in range(len(self.channels)) for level in self.attention_levels):
            raise ValueError(f"attention_levels {self.attention_levels}: levels go from 0 to {len(self.channels) - 1}")
        # The middle block attends too, on the last level.
        attending = [self.channels[level] for level in {*self.attention_levels, len(self.channels) - 1}]
        if self.attention_levels and any(channels % self.head_channels for channels in attending):
            raise ValueError(f"head_channels={self.head_channels}: the attending levels have {attending} channels")
        return self

    def of_module(self) -> dict[str, Any]:
        """The fields that tell what a module is, as JSON values; `min_images` tells whether there is one."""
        return self.model_dump(mode="json", exclude={"min_images"})

    def steps(self, n_images: int) -> int:
        """Optimiser steps for a class of so many images."""
        return min(max(round(self.epochs * n_images / self.batch_size), self.min_steps), self.max_steps)

    def check_resolution(self, resolution: int) -> None:
        """Raise ValueError where the U-Net cannot halve `resolution` (pixels) often enough."""
        divisor = self.patch * 2 ** (len(self.channels) - 1)
        if resolution % divisor:
            raise ValueError(
                f"resolution {resolution} with patch={self.patch} and {len(self.channels)} levels needs a multiple of "
                f"{divisor}: use fewer generator.channels, another generator.patch, or data.resolution="
                f"{max(divisor, round(resolution / divisor) * divisor)}"
            )


class SamplerConfig(Section):
    """How images are drawn from noise."""

    added = frozenset({"compile"})

    solver: Literal["dpmpp", "dpmpp3m", "heun"] = "dpmpp"
    """`dpmpp`, `dpmpp3m`: DPM-Solver++(2M), (3M), one network evaluation a step; `heun`: EDM's reference, two."""
    evaluations: int = Field(10, ge=2)
    """Network evaluations an image (Heun: rounded down to an odd number)."""
    sigma_min: float = Field(0.01, gt=0)
    """Smallest noise level, in units in which data have standard deviation 0.5."""
    sigma_max: float = Field(40.0, gt=0)
    """Largest noise level, in the same units."""
    rho: float = Field(7.0, gt=0)
    """Curvature of the noise schedule (Karras et al. 2022, eq. 5)."""
    compile: bool = False
    """Compile the network on GPUs: half a minute a process, and then more than twice the images a second."""

    @model_validator(mode="after")
    def _levels_are_ordered(self) -> SamplerConfig:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min} needs to be below sigma_max={self.sigma_max}")
        return self


class SynthesisConfig(Section):
    """The class-balanced synthetic data set."""

    images_per_class: int = Field(500, ge=2)
    """Images of each class, shared by the clients that hold it in proportion to their images."""
    batch_size: int = Field(125, ge=1)
    """Images a network call; fixed, for an image's bytes depend on it."""
    unit_size: int = Field(250, ge=1)
    """Images a unit of work, which becomes one Parquet file; a multiple of batch_size."""

    @model_validator(mode="after")
    def _units_hold_whole_batches(self) -> SynthesisConfig:
        if self.unit_size % self.batch_size:
            raise ValueError(f"unit_size={self.unit_size} needs to be a multiple of batch_size={self.batch_size}")
        return self


class ClassifierConfig(Section):
    """The classifier that is fitted on the synthetic images, and its recipe."""

    model: Literal["cnn", "fast", "resnet18", "resnet50"] = "cnn"
    """A small CNN for CPUs; a network that learns images of 8 to 64 pixels in few epochs (Jordan 2024); torchvision's
    ResNet with a small-image stem."""
    norm: Norm = "group"
    """Normalisation layers; `batch` keeps statistics of the images seen, which federated averaging cannot average."""
    epochs: int = Field(10, ge=1)
    """Passes over the synthetic images."""
    batch_size: int = Field(64, ge=2)
    """Images an optimiser step, over all workers."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum 0.9; cosine schedule with 5 % warm-up."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay."""
    label_smoothing: float = Field(0.05, ge=0, lt=1)
    """Label smoothing (Szegedy et al. 2016)."""
    flips: Flips = "none"
    """Random symmetries: left-right, or all eight of the square."""
    shift: float = Field(0.1, ge=0, le=0.5)
    """Largest random translation, as a share of the side."""
    scale: float = Field(0.1, ge=0, lt=1)
    """Largest random zoom, in or out."""
    rotate: float = Field(10.0, ge=0, le=180)
    """Largest random rotation, in degrees."""
    contrast: float = Field(0.0, ge=0, le=1)
    """Largest random change of contrast, as a share."""
    tint: float = Field(0.0, ge=0, le=1)
    """Largest random shift of each colour channel (images lie in [-1, 1])."""
    blur: float = Field(0.0, ge=0, le=1)
    """Largest random weight of the 3×3 mean."""
    noise: float = Field(0.0, ge=0, le=1)
    """Largest random deviation of added noise (images lie in [-1, 1])."""
    validation_fraction: float = Field(0.1, gt=0, le=0.5)
    """Share of the synthetic images held back to choose the epoch and to calibrate: one in a whole number."""
    precision: Precision = "auto"
    """Arithmetic of training; auto: bf16 where the hardware has it, else fp32."""


class ExpertsConfig(Section):
    """The experts of the decentralised architecture, each fitted by its client with the classifier's recipe."""

    real_share: float = Field(1.0, ge=0, le=1)
    """Largest share of real images among those of a class that a client holds; synthetic ones make up the rest."""


class FederatedConfig(Section):
    """The federated baselines: clients descend with plain SGD on the classifier's recipe (network, augmentation, label
    smoothing, batch size), the server averages."""

    rounds: int = Field(100, ge=1)
    """Most rounds; the best one by balanced accuracy on the clients' validation images is kept."""
    patience: int = Field(30, ge=1)
    """Stop after this many rounds without a better one."""
    local_epochs: int = Field(5, ge=1)
    """Passes of a client over its own images in a round."""
    client_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the clients that take part in a round, drawn anew each time; at least one."""
    fedavg_lr: float = Field(0.1, gt=0)
    """`fedavg`: learning rate of the clients' SGD."""
    fedprox_lr: float = Field(0.1, gt=0)
    """`fedprox`: learning rate of the clients' SGD."""
    scaffold_lr: float = Field(0.1, gt=0)
    """`scaffold`: learning rate of the clients' SGD."""
    feddyn_lr: float = Field(0.03, gt=0)
    """`feddyn`: learning rate of the clients' SGD."""
    server_lr: float = Field(1.0, gt=0)
    """Step of the server towards the clients' average (`fedavg`, `fedprox`, `scaffold`)."""
    weight_decay: float = Field(1e-4, ge=0)
    """L2 regularisation of the clients' loss."""
    grad_clip: float = Field(10.0, gt=0)
    """Largest norm of a batch's gradient, before the method corrects it."""
    prox_mu: float = Field(0.001, ge=0)
    """`fedprox`: weight of the proximal term."""
    feddyn_alpha: float = Field(0.03, gt=0)
    """`feddyn`: weight of the dynamic regulariser."""
    validation_every: int = Field(10, ge=2)
    """Every so-many-th training image of each (client, class) is held back for the choice of the round."""
