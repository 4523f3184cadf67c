"""`geopose stage`: fill this machine's disk with the shards of a run beforehand, in a prolog or while it waits."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from geopose_dist import config
from geopose_dist.data import catalogue, staging
from geopose_dist.data.reader import open_shards
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.errors import UserError


@dataclass(frozen=True)
class StageRecipe:
    """Which shards to keep on this machine; --config takes training recipes, too (their data part counts)."""

    shards: str = ""
    """Shards that `geopose pack` made: a folder, perhaps of a shared disk, or a URL."""
    splits: list[str] = field(default_factory=list)
    """Splits to stage; empty: all."""
    store: StoreRecipe = field(default_factory=StoreRecipe)
    """How a URL is reached, where on this machine shards are kept (cache_dir), and how many (stage_gb)."""

    @staticmethod
    def adapt_config(path: Path) -> str:
        """The recipe file as YAML of this class: of a training recipe, what its data part says."""
        text, values = config.read_file(path)
        if not isinstance(values, dict) or not values.keys() - {"shards", "splits", "store"}:
            return text
        data = values.get("data") or {}
        return yaml.safe_dump({name: data[name] for name in ("shards", "store") if name in data})


def run(recipe: StageRecipe) -> None:
    """Stage, and say where (UserError, StoreFailure)."""
    if not recipe.shards:
        raise UserError("shards is not set; name the folder or URL that `geopose pack` made: --shards PLACE")
    store = dataclasses.replace(recipe.store, stage="node")
    splits = recipe.splits or list(catalogue.read_manifest(recipe.shards, store).splits())
    sets = [open_shards(recipe.shards, split, store) for split in splits]
    staging.stage(sets).close()
    shards = [shard for shard_set in sets for shard in staging.shards_of(shard_set)]
    told = f"{len(shards)} shards, {sum(shard.bytes for shard in shards) / 1e9:.3f} GB"
    print(f"{told} in {staging.folder_of(store)}; `data.store.stage: node` reads them there", file=sys.stderr)
