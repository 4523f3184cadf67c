"""Everything that a training run is, in one tree of frozen dataclasses; no torch here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from geopose_dist.augment.recipe import AugmentRecipe
from geopose_dist.data.recipe import DataRecipe
from geopose_dist.model.recipe import LossRecipe, ModelRecipe

LENGTH = re.compile(r"^\s*([0-9.]+)\s*(epoch|step|minute)s?\s*$")


@dataclass(frozen=True)
class Length:
    """How long a run is: a number of epochs, steps or minutes."""

    value: float
    unit: Literal["epoch", "step", "minute"]

    @classmethod
    def parse(cls, text: str) -> Length:
        """`40 epochs`, `3000 steps` or `5 minutes` (ValueError)."""
        match = LENGTH.match(text)
        if match is None or float(match.group(1)) <= 0:
            raise ValueError(f'length is {text!r}; wanted a number above 0 and a unit, such as "40 epochs", '
                             '"3000 steps" or "5 minutes"')  # fmt: skip
        value, unit = float(match.group(1)), match.group(2)
        if unit == "step" and value != int(value):
            raise ValueError(f"length is {text!r}; wanted a whole number of steps")
        return cls(value, unit)  # type: ignore[arg-type]

    def steps(self, samples: int, global_batch: int) -> int | None:
        """Steps of the run over `samples` tiles: ceil(epochs * N / G); None where the clock decides."""
        if self.unit == "minute":
            return None
        return (
            int(self.value) if self.unit == "step" else max(1, math.ceil(self.value * samples / global_batch))
        )


@dataclass(frozen=True)
class OptimRecipe:
    """The optimiser and its schedule, which follows the length of the run."""

    name: Literal["adam", "adamw"] = "adamw"
    """Adam is the benchmark's."""
    lr: float = 1e-3
    """Peak learning rate."""
    encoder_lr_factor: float = 1.0
    """Learning rate of the encoder as a share of `lr`."""
    layer_decay: float = 1.0
    """Pretrained encoders: each stage learns at this share of the next deeper one's rate, so that what ImageNet
    taught the shallow ones stays; 1: all alike."""
    lr_batch: int = 0
    """Global batch that `lr` is meant for: another one changes it by `lr_rule`; 0: `lr` is as it stands."""
    lr_rule: Literal["sqrt", "linear"] = "sqrt"
    """Growth of the rate with the batch; the root suits Adam's normalised steps, linear is SGD's rule."""
    weight_decay: float = 0.01
    """For adamw; normalisation and biases are left out."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """Constant is the benchmark's; cosine falls to `final_lr_factor` at the end of the run; step is multiplied
    by `step_factor` at each of `milestones`."""
    milestones: list[float] = field(default_factory=lambda: [0.6, 0.85])
    """Where `schedule: step` falls, as shares of the run, so that it follows the run's length."""
    step_factor: float = 0.1
    """What `schedule: step` multiplies by."""
    final_lr_factor: float = 0.0
    """Learning rate at the end of cosine as a share of `lr`."""
    warmup_steps: int = 50
    """Steps of linear growth at the start."""
    clip_norm: float = 5.0
    """Largest norm of the gradient; 0 = no clipping."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optim.lr is {self.lr}; wanted a number above 0")
        least_zero = (
            "encoder_lr_factor", "weight_decay", "final_lr_factor", "warmup_steps", "clip_norm", "lr_batch"
        )  # fmt: skip
        for name in least_zero:
            if not getattr(self, name) >= 0:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; wanted a number >= 0")
        for name in ("layer_decay", "step_factor"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; wanted 0 < {name} <= 1")
        if not all(0 < share < 1 for share in self.milestones):
            raise ValueError(
                f"optim.milestones is {self.milestones}; wanted shares of the run between 0 and 1"
            )


@dataclass(frozen=True)
class ValidationRecipe:
    """When and how the official score on the validation split is taken."""

    every_epochs: float = 1.0
    """Validate at the first step past each multiple of so many epochs; 0 = only at the end."""
    patience: int = 0
    """End the run after so many validations in a row without a better score; 0: never."""
    panels: int = 4
    """Validation tiles, evenly spread and always the same, whose picture, heights, error and flow TensorBoard
    shows after each validation; 0: none."""

    def __post_init__(self) -> None:
        for name in ("patience", "panels"):
            if getattr(self, name) < 0:
                raise ValueError(f"validation.{name} is {getattr(self, name)}; wanted 0 or more")
        if self.every_epochs < 0:
            raise ValueError(f"validation.every_epochs is {self.every_epochs}; wanted a number >= 0")


@dataclass(frozen=True)
class CheckpointRecipe:
    """When checkpoints are written and how many are kept."""

    every_steps: int = 500
    """Steps between checkpoints; one is also written at each validation, at the end, and when stopped."""
    keep: int = 2
    """Newest checkpoints kept beside the best one."""
    asynchronous: bool = True
    """Write in the background while training goes on; the last save of a run is always waited for."""

    def __post_init__(self) -> None:
        if self.every_steps < 1 or self.keep < 1:
            raise ValueError("checkpoint.every_steps and checkpoint.keep must be at least 1")


@dataclass(frozen=True)
class DdpRecipe:
    """How gradients travel between ranks."""

    bucket_mb: int = 25
    """MiB of gradients that are exchanged together; larger buckets suit more ranks."""
    static_graph: bool = False
    """Tell DDP that every step uses the network alike, so that it may plan ahead; it always does here."""
    compression: Literal["none", "bf16"] = "none"
    """bf16 rounds gradients to bfloat16 (8 bits of precision) for the exchange: half the bytes, and no longer
    the numbers of one rank."""

    def __post_init__(self) -> None:
        if self.bucket_mb < 1:
            raise ValueError(f"ddp.bucket_mb is {self.bucket_mb}; wanted at least 1")


@dataclass(frozen=True)
class TrainRecipe:
    """A training run, whole: the same recipe, shards and seed give the same run on any number of ranks."""

    out: str = "runs/train"
    """Run folder: recipe, metrics, checkpoints; all machines share it, or it is s3://, gs:// or az:// and where. A run
    that is there already goes on."""
    data: DataRecipe = field(default_factory=DataRecipe)
    """Which tiles, in which order, in which batches."""
    augment: AugmentRecipe = field(default_factory=AugmentRecipe)
    """What is done to a tile before the network sees it."""
    model: ModelRecipe = field(default_factory=ModelRecipe)
    """The network."""
    loss: LossRecipe = field(default_factory=LossRecipe)
    """What is minimised."""
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    """How it is minimised."""
    validation: ValidationRecipe = field(default_factory=ValidationRecipe)
    """When the score is taken."""
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    """When the run is saved."""
    length: str = "40 epochs"
    """Length of the run: `40 epochs`, `3000 steps` or `5 minutes`."""
    seed: int = 0
    """Of weights, order, augmentation and dropout."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "bf16"
    """Arithmetic of the network; losses and heads are always fp32. fp16 scales its loss."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = a GPU per local rank if this host has any."""
    channels_last: bool = True
    """Memory layout that convolutions prefer."""
    compile: Literal["off", "default", "max-autotune"] = "off"
    """torch.compile mode of the network."""
    checkpoint_activations: bool = False
    """Compute blocks again in the backward pass instead of keeping what they computed, for crops that would not
    fit: the same numbers, a third of the memory and a third more time (ResNet-34, see PERFORMANCE.md)."""
    sync_batchnorm: bool = False
    """Normalise by the tiles of all ranks at once; GPUs only, and every rank needs equally many micro-batches."""
    ddp: DdpRecipe = field(default_factory=DdpRecipe)
    """How gradients travel between ranks."""
    ema_decay: float = 0.0
    """Decay of the averaged weights that are validated and saved beside the raw ones; 0 = none."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    profile: bool = False
    """Write a torch profiler trace of steps 5 to 10 of this start into the run folder, for Perfetto."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose gradient is not finite is never applied and its batch is saved for `geopose replay`; then the
    run stops, or goes on without that step."""
    nonfinite_limit: int = 10
    """Steps, since the start, that `on_nonfinite: skip` may leave out before the run stops after all."""
    init_from: str | None = None
    """Checkpoint or run (a path, or the URL of a run) whose weights this run starts from; unlike going on, nothing
    else is taken over."""
    allow_change: list[str] = field(default_factory=list)
    """Fields, such as `optim.lr`, that may differ from those of the run that goes on."""
    timeout_s: float = 600.0
    """How long a rank waits for the others before the run ends, naming who did not come (exit code 75)."""
    preflight: Literal["refuse", "warn"] = "refuse"
    """Ranks with other versions, recipes or shards than rank 0's stop the run before it begins, or are only told."""
    check: bool = False
    """Look at recipe, shards, weights, checkpoints and disk, say what is wrong, and train nothing."""

    def __post_init__(self) -> None:
        Length.parse(self.length)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; wanted 0 <= ema_decay < 1")
        if self.log_every < 1:
            raise ValueError(f"log_every is {self.log_every}; wanted at least 1")
        if not 1 <= self.timeout_s <= 86400:
            raise ValueError(f"timeout_s is {self.timeout_s}; wanted 1 to 86400 seconds")
        if self.checkpoint_activations and self.compile != "off":
            raise ValueError(
                f"checkpoint_activations with compile {self.compile}: torch.compile chooses by itself what to compute "
                "again; set one of them off"
            )


@dataclass(frozen=True)
class ReplayRecipe:
    """Which saved batch, and how it is run again."""

    batch: list[Path]
    """Folders RUN/nonfinite/step-NNNNNNNN, or run folders (their newest such step)."""
    rank: int | None = None
    """Look at the micro-batches of this rank only; unset: of all ranks."""
    checkpoint: Path | None = None
    """Weights to use; unset: those saved beside the batch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run it; another device rounds differently."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] | None = None
    """Arithmetic of the network; unset: the run's. fp32 shows whether the rounding is to blame."""

    def __post_init__(self) -> None:
        if not self.batch:
            raise ValueError("batch is empty; name a folder RUN/nonfinite/step-NNNNNNNN, or a run folder")
