"""What a run is opened from: splits, starting weights, and the numbers that a recipe leaves to the data."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from geopose_dist.augment import transform_of
from geopose_dist.data import catalogue
from geopose_dist.data.loader import TrainLoader, train_loader
from geopose_dist.data.manifest import ShardSet
from geopose_dist.data.reader import Reader, open_shards
from geopose_dist.errors import LostPeer, UserError
from geopose_dist.model import pretrained, run_store, weights
from geopose_dist.model.city_spread import LEAST_STD_M
from geopose_dist.model.recipe import LossRecipe, ModelRecipe
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.runtime import World
from geopose_dist.train import checkpoint, parallel, recompute
from geopose_dist.train.beginning import Beginning
from geopose_dist.train.checkpoint import Progress, Snapshot
from geopose_dist.train.recipe import Length, TrainRecipe

ENDLESS_STEPS = 2**40
"""Steps that the loader is ready for where the clock ends the run."""


@dataclass(frozen=True)
class Opened:
    """A run that was found in order, with nothing written yet.

    Attributes:
        recipe: with the numbers that it leaves to the data filled in.
        source: where the weights start, as a sentence for the log.
        total_steps: steps of the whole run; None if the clock decides.
    """

    recipe: TrainRecipe
    shards: ShardSet
    validation: ShardSet | None
    net: GeoposeNet
    source: str
    progress: Progress
    stored: Snapshot | None
    total_steps: int | None
    beginning: Beginning

    def summary(self, world: World) -> str:
        """The first sentence of a run."""
        recipe = self.recipe
        where = self.source if self.stored is None else f"goes on after step {self.progress.step}"
        length = f"{self.total_steps} steps" if self.total_steps is not None else recipe.length
        return (
            f"{recipe.out}: {len(self.shards)} tiles, {length} of {recipe.data.global_batch}, {world.size} rank(s) on "
            f"{world.device.type}, {recipe.precision}; {where}"
        )


def look(recipe: TrainRecipe, world: World, beginning: Beginning | None = None) -> Opened:
    """Open data, network and checkpoint of a run; every mistake in the recipe shows here (UserError).

    `beginning` is what the ranks did before they had a group; without one this process looks for itself.
    """
    beginning = beginning or Beginning.alone(recipe)
    if not recipe.data.shards:
        raise UserError("data.shards is not set; name the folder that `geopose pack` made: --data.shards DIR")
    parallel.check_parallel(recipe, world)
    shards = open_shards(recipe.data.shards, recipe.data.train_split, recipe.data.store)
    shards = shards.first(recipe.data.samples)
    check_crop(recipe.data.crop_px, shards)
    validation = validation_split(recipe, world)
    recipe = with_data_facts(recipe, shards)
    folder, fingerprint = beginning.checkpoint, shards.fingerprint()
    progress, stored = Progress(fingerprint=fingerprint), None
    if folder is not None:
        checkpoint.check_same_run(folder, recipe, fingerprint)
        progress, stored = checkpoint.read_progress(folder), checkpoint.load(folder)
    check_same_step(progress.step, world)
    torch.manual_seed(recipe.seed)
    net = GeoposeNet(recipe.model)
    source = start_weights(net, recipe, stored, world)
    each_bytes = checkpoint.size_bytes(net, recipe.ema_decay > 0)
    keep = recipe.checkpoint.keep if beginning.store is None else 1
    world.on_first(lambda: checkpoint.check_room(beginning.folder, each_bytes, keep))
    total_steps = Length.parse(recipe.length).steps(len(shards), recipe.data.global_batch)
    return Opened(recipe, shards, validation, net, source, progress, stored, total_steps, beginning)


def check_same_step(step: int, world: World) -> None:
    """Refuse to begin where ranks hold different checkpoints, whatever made them so (LostPeer).

    They agreed before (`beginning`); but torchrun may hand restarted ranks a store with old words in it
    (docs/decisions.md, entry 3), and ranks that go on from different steps would train nonsense in silence.
    """
    steps = [int(found) for found in torch.cat(world.gather(torch.tensor([step])))]
    if len(set(steps)) > 1:
        told = ", ".join(
            f"{world.names([steps.index(found)])} after step {found}" for found in sorted(set(steps))
        )
        raise LostPeer(f"ranks would go on from different checkpoints ({told}); run the same command again")


def check_crop(crop_px: int | None, shards: ShardSet) -> None:
    """Refuse a crop that the first tile cannot give, before any work; a smaller one later on shows when it is read."""
    if crop_px is None or len(shards) == 0:
        return
    rows, columns = Reader(shards).facts(0).size
    if crop_px > min(rows, columns):
        raise UserError(
            f"data.crop_px is {crop_px}, larger than the tiles of {shards.root} ({rows} x {columns} px); choose at "
            f"most {min(rows, columns)}, or null for whole tiles"
        )


def prepared(opened: Opened, world: World) -> GeoposeNet:
    """The network as it is trained: on its device, in its layout, with the recipe's arithmetic."""
    recipe, net = opened.recipe, opened.net
    if recipe.sync_batchnorm:
        net = parallel.normalise_over_ranks(net)
    if recipe.checkpoint_activations:
        recompute.recompute_blocks(net)
    net.to(world.device)
    if recipe.channels_last:
        net.to(memory_format=torch.channels_last)
    set_arithmetic(recipe.precision)
    return net.train()


def loader_of(opened: Opened, world: World) -> TrainLoader:
    """This rank's micro-batches, step by step, from where the run is."""
    recipe = opened.recipe
    return train_loader(
        opened.shards,
        recipe.data,
        seed=recipe.seed,
        rank=world.rank,
        world_size=world.size,
        start_step=opened.progress.step,
        stop_step=opened.total_steps if opened.total_steps is not None else ENDLESS_STEPS,
        transform=transform_of(recipe.augment, recipe.data.crop_px),
    )


GSD_SAMPLES = 16
"""Tiles that are asked whether the training split knows GSDs at all."""


def validation_split(recipe: TrainRecipe, world: World) -> ShardSet | None:
    """The split that the score is taken on; without one, training says so once and goes on."""
    known = catalogue.read_manifest(recipe.data.shards, recipe.data.store).splits()
    if known.get(recipe.data.validation_split, 0) == 0:
        if world.is_first:
            print(
                f"{recipe.data.shards} has no split {recipe.data.validation_split!r}: no score will be taken; "
                "`geopose split` makes a leak-free one",
                file=sys.stderr,
            )
        return None
    return open_shards(recipe.data.shards, recipe.data.validation_split, recipe.data.store)


def start_weights(net: GeoposeNet, recipe: TrainRecipe, stored: Snapshot | None, world: World) -> str:
    """Fill `net` from the checkpoint, from `init_from`, or from its encoder's source; says which."""
    if stored is not None:
        weights.load_state(net, stored.model, recipe.out)
        return "goes on"
    if recipe.init_from is not None:
        donor, _ = weights.load_net(run_store.fetched_weights(recipe.init_from, recipe.data.store))
        weights.load_state(net, donor.state_dict(), recipe.init_from)
        return f"starts from the weights of {recipe.init_from}"
    if recipe.model.weights != "hub":
        return pretrained.load_encoder(net)
    told: list[str] = []  # one download; DDP begins with rank 0's weights everywhere
    world.on_first(lambda: told.append(pretrained.load_encoder(net)))
    return told[0] if told else "encoder starts from rank 0's weights"


def with_data_facts(recipe: TrainRecipe, shards: ShardSet) -> TrainRecipe:
    """The recipe with what it leaves open filled in from the statistics of the training split."""
    model = with_data_means(recipe.model, shards)
    if model.city_input and not model.cities:
        model = replace(model, cities=list(shards.manifest.cities))
    return replace(recipe, model=model, loss=with_city_spread(recipe.loss, shards))


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
    """Fill the loss's deviations and means by city from the statistics of the training split, if unset.

    A city without known heights gets the median of the others.
    """
    cities = shards.manifest.statistics.get(shards.split, {})

    def by_city(statistic: str, least: float, otherwise: float) -> dict[str, float]:
        known = {city: facts[statistic] for city, facts in cities.items() if facts.get(statistic)}
        middle = statistics.median(known.values()) if known else otherwise
        return {city: round(max(known.get(city, middle), least), 6) for city in shards.manifest.cities}

    mean_m, scale = by_city("agl_mean_m", 0.0, 0.0), by_city("scale_mean_px_per_m", 0.0, 0.5)
    return replace(
        loss,
        city_std_m=loss.city_std_m or by_city("agl_std_m", LEAST_STD_M, 1.0),
        city_mean_m=loss.city_mean_m or mean_m,
        city_mean_px=loss.city_mean_px or {city: round(mean_m[city] * scale[city], 6) for city in mean_m},
    )


def facts_of(shards: ShardSet, model: ModelRecipe) -> dict[str, Any]:
    """What prediction must share with training, for the checkpoint."""
    few = range(0, len(shards), max(1, len(shards) // GSD_SAMPLES))
    return {
        "gsd_known": (model.gsd_input or model.scale == "zenith")
        and any(Reader(shards).facts(i).gsd_m is not None for i in few),
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
