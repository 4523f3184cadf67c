"""What a run is opened from: splits, starting weights, and the numbers that a recipe leaves to the data."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from geopose_dist.data import manifest
from geopose_dist.data.manifest import ShardSet
from geopose_dist.data.reader import open_shards
from geopose_dist.model import pretrained, weights
from geopose_dist.model.recipe import LossRecipe, ModelRecipe
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.runtime import World
from geopose_dist.train.checkpoint import Snapshot
from geopose_dist.train.recipe import TrainRecipe


def validation_split(recipe: TrainRecipe, world: World) -> ShardSet | None:
    """The split that the score is taken on; without one, training says so once and goes on."""
    known = manifest.read_manifest(Path(recipe.data.shards)).splits()
    if known.get(recipe.data.validation_split, 0) == 0:
        if world.is_first:
            print(
                f"{recipe.data.shards} has no split {recipe.data.validation_split!r}: no score will be taken; "
                "`geopose split` makes a leak-free one",
                file=sys.stderr,
            )
        return None
    return open_shards(recipe.data.shards, recipe.data.validation_split)


def start_weights(net: GeoposeNet, recipe: TrainRecipe, stored: Snapshot | None) -> str:
    """Fill `net` from the checkpoint, from `init_from`, or from its encoder's source; says which."""
    if stored is not None:
        weights.load_state(net, stored.model, recipe.out)
        return "goes on"
    if recipe.init_from is not None:
        donor, _ = weights.load_net(Path(recipe.init_from))
        weights.load_state(net, donor.state_dict(), recipe.init_from)
        return f"starts from the weights of {recipe.init_from}"
    return pretrained.load_encoder(net)


def with_data_facts(recipe: TrainRecipe, shards: ShardSet) -> TrainRecipe:
    """The recipe with what it leaves open filled in from the statistics of the training split."""
    return replace(
        recipe, model=with_data_means(recipe.model, shards), loss=with_city_spread(recipe.loss, shards)
    )


def with_data_means(model: ModelRecipe, shards: ShardSet) -> ModelRecipe:
    """Fill the model's starting height and scale from the statistics of the training split, if unset."""
    cities = [facts for facts in shards.manifest.statistics.get(shards.split, {}).values() if facts]
    filled: dict[str, float] = {}
    for name, statistic, otherwise in (
        ("height_mean_m", "agl_mean_m", 4.0),
        ("height_unit_m", "agl_std_m", 6.0),
        ("scale_mean_px_per_m", "scale_mean_px_per_m", 0.5),
    ):
        if getattr(model, name) is None:
            means = [facts[statistic] for facts in cities if facts.get(statistic)]
            filled[name] = round(max(sum(means) / len(means), 1e-3), 6) if means else otherwise
    return dataclasses.replace(model, **filled)  # type: ignore[arg-type]


def with_city_spread(loss: LossRecipe, shards: ShardSet) -> LossRecipe:
    """Fill the loss's standard deviations by city from the statistics of the training split, if unset.

    A city without known heights gets the median of the others.
    """
    if loss.city_std_m:
        return loss
    cities = shards.manifest.statistics.get(shards.split, {})
    known = {city: facts["agl_std_m"] for city, facts in cities.items() if facts.get("agl_std_m")}
    middle = statistics.median(known.values()) if known else 1.0
    spread = {city: round(max(known.get(city, middle), 0.1), 6) for city in shards.manifest.cities}
    return replace(loss, city_std_m=spread)


def facts_of(shards: ShardSet) -> dict[str, Any]:
    """What prediction must share with training, for the checkpoint."""
    return {
        "reduction": int(shards.manifest.recipe.get("reduce", 1)),
        "reduce_by": str(shards.manifest.recipe.get("reduce_by", "area")),
        "cities": shards.manifest.cities,
        "fingerprint": shards.fingerprint(),
    }


def set_arithmetic(precision: str) -> None:
    """Let matrix products and convolutions of float32 use TF32, or forbid it."""
    kind = "tf32" if precision in ("tf32", "bf16", "fp16") else "ieee"
    torch.backends.cuda.matmul.fp32_precision = kind
    torch.backends.cudnn.conv.fp32_precision = kind  # type: ignore[attr-defined]
