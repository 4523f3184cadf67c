"""`geopose order`: the keys in the order in which a run, or one rank of it, reads them.

It asks the same plan as the loader, so what it prints is what a run with that recipe reads. One key per line
on stdout and nothing else, for other programs to compare.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from geopose_dist import config
from geopose_dist.data.plan import Plan, check_batches, parse_order, rank_of
from geopose_dist.data.reader import Reader, open_shards
from geopose_dist.data.recipe import DataRecipe
from geopose_dist.data.store_recipe import StoreRecipe

PAGE = 4096
"""Positions computed at a time."""

FROM_TRAINING = (
    "shards",
    "store",
    "train_split",
    "samples",
    "order",
    "city_weights",
    "global_batch",
    "micro_batch",
)
TRAINING_ONLY = {"data", "model", "augment", "length", "optim", "precision", "out"}
"""Any of these at the top of a file shows that it is a training recipe."""


@dataclass(frozen=True)
class OrderRecipe:
    """Which part of which stream to print; --config takes training recipes, too (data and seed count)."""

    shards: str = ""
    """Shards that `geopose pack` made: a folder or URL."""
    store: StoreRecipe = field(default_factory=StoreRecipe)
    """How shards behind a URL are reached and kept."""
    epoch: int = 0
    """Visit of the data set that start counts from."""
    start: int = 0
    """First position to print, counted over all ranks from the epoch's first."""
    count: int | None = None
    """Positions of the whole stream to look at, of which a rank prints its own; unset: to the epoch's end."""
    seed: int = 0
    """Seed of the run."""
    train_split: str = "train"
    """Split that the run learns from."""
    samples: int = 0
    """Samples at its beginning that the run learns from; 0: all."""
    order: str = "full"
    """full, or block:K."""
    city_weights: dict[str, int] = field(default_factory=dict)
    """Weights of the city-balanced order."""
    global_batch: int | None = None
    """Samples of one step; unset: one per rank, or training's default if --config is a training recipe."""
    micro_batch: int | None = None
    """Samples of one forward pass; unset: one, or training's default if --config is a training recipe."""
    world_size: int = 1
    """Ranks of the run."""
    rank: int | None = None
    """Print only what this rank reads; unset: every position."""
    of_training: bool = False
    """Set by a training recipe given as --config: what it leaves out has the defaults of training."""

    def __post_init__(self) -> None:
        parse_order(self.order)
        if self.samples < 0:
            raise ValueError(f"samples is {self.samples}; wanted 0 (all) or more")
        if self.epoch < 0 or self.start < 0 or (self.count is not None and self.count < 0):
            raise ValueError(
                f"epoch {self.epoch}, start {self.start}, count {self.count}: none of them can be negative"
            )
        if self.world_size < 1:
            raise ValueError(f"world_size is {self.world_size}; wanted 1 or more ranks")
        if self.rank is not None and not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank is {self.rank}; wanted 0 to {self.world_size - 1}, or none for all of them"
            )
        check_batches(*self.batches())

    def batches(self) -> tuple[int, int]:
        """Global batch and micro-batch, with what is unset filled in."""
        data = DataRecipe()
        defaults = (data.global_batch, data.micro_batch) if self.of_training else (self.world_size, 1)
        return self.global_batch or defaults[0], self.micro_batch or defaults[1]

    @staticmethod
    def adapt_config(path: Path) -> str:
        """What this verb takes from a recipe file: all of its own kind, the order of a training recipe."""
        text, values = config.read_file(path)
        if not isinstance(values, dict) or not TRAINING_ONLY & values.keys():
            return text
        data = values.get("data") or {}
        kept = {name: data[name] for name in FROM_TRAINING if name in data}
        kept |= {"seed": values["seed"]} if "seed" in values else {}
        return yaml.safe_dump(kept | {"of_training": True})


def run(recipe: OrderRecipe) -> None:
    """Print the keys (UserError: no such shards, a damaged header)."""
    shard_set = open_shards(recipe.shards, recipe.train_split, recipe.store).first(recipe.samples)
    global_batch, micro_batch = recipe.batches()
    plan = Plan.of(
        shard_set,
        seed=recipe.seed,
        order=recipe.order,
        global_batch=global_batch,
        micro_batch=micro_batch,
        city_weights=recipe.city_weights,
    )
    reader = Reader(shard_set)
    reader.check_order(parse_order(recipe.order))
    first = recipe.epoch * plan.samples + recipe.start
    count = max(plan.samples - recipe.start, 0) if recipe.count is None else recipe.count
    for page in range(first, first + count, PAGE):
        positions = [
            position
            for position in range(page, min(page + PAGE, first + count))
            if recipe.rank is None
            or rank_of(position, global_batch, micro_batch, recipe.world_size) == recipe.rank
        ]
        _, indices = plan.samples_at(positions)
        sys.stdout.writelines(f"{key}\n" for key in reader.keys(indices.tolist()))
