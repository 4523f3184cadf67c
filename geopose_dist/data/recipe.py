"""What a run reads, and how: the `data` part of a training recipe. Free of torch, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from geopose_dist.data.plan import check_batches, parse_order
from geopose_dist.data.store_recipe import StoreRecipe


@dataclass(frozen=True)
class DataRecipe:
    """What to train on, in which order, and how it is fed."""

    shards: str = ""
    """Shards that `geopose pack` made: a folder, or s3://, gs://, az:// or http(s):// and where they are."""
    store: StoreRecipe = field(default_factory=StoreRecipe)
    """How shards behind a URL are reached and kept."""
    train_split: str = "train"
    """Split to learn from."""
    validation_split: str = "val"
    """Split to validate on; training goes on without one, and says so, if the shards have none."""
    samples: int = 0
    """Learn from the first so many samples of the split only, which packing shuffled; 0: all of them."""
    global_batch: int = 8
    """Samples of one optimiser step over all ranks; part of the meaning of a run, so resuming keeps it."""
    micro_batch: int = 4
    """Samples of one forward pass on one device; divides global_batch; kept by resuming, too."""
    workers: int = -1
    """Loader processes per rank; 0 loads in the training process, -1 chooses from cores and local ranks."""
    prefetch: int = 2
    """Micro-batches that each loader process keeps ready."""
    order: str = "full"
    """full: every visit is a permutation of all samples; block:K: shards permuted, then samples within K."""
    city_weights: dict[str, int] = field(default_factory=dict)
    """City-balanced order: of each sum(weights) samples, w come from a city; '*' is every city not named;
    empty: every sample alike."""
    crop_px: int | None = None
    """Side of the square crop to train on, in stored pixels; unset: whole tiles (of one size)."""
    on_damage: Literal["stop", "substitute"] = "stop"
    """A sample that cannot be read stops the run, or is replaced by a keyed draw and logged."""
    damage_limit: int = 10
    """Replaced samples of all ranks and starts of a run past which it stops after all; `damage.jsonl` names them."""

    def __post_init__(self) -> None:
        check_batches(self.global_batch, self.micro_batch)
        parse_order(self.order)
        if self.samples < 0:
            raise ValueError(f"samples is {self.samples}; wanted 0 (all) or more")
        if self.workers < -1:
            raise ValueError(f"workers is {self.workers}; wanted 0 or more, or -1 to choose")
        if self.prefetch < 1:
            raise ValueError(f"prefetch is {self.prefetch}; wanted 1 or more micro-batches per worker")
        if self.crop_px is not None and self.crop_px < 1:
            raise ValueError(f"crop_px is {self.crop_px}; wanted a positive number of pixels, or none")
        negative = [city for city, weight in self.city_weights.items() if weight < 0]
        if negative:
            raise ValueError(f"city_weights of {', '.join(negative)} are negative; wanted whole numbers >= 0")
        if self.damage_limit < 0:
            raise ValueError(f"damage_limit is {self.damage_limit}; wanted 0 or more samples")
