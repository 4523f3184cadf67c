"""`geopose calibrate`: fit a height calibration on the validation split, and say honestly whether it helps.

Every tile is predicted once and reduced to sums by predicted height, from which any factor or curve can be
fitted and scored without the pixels. The numbers told are out of fold: places are dealt into folds, each is scored by
what the others fitted, so a calibration cannot praise itself. What is saved is fitted on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from geopose_dist import geometry, metrics_log
from geopose_dist.data import resample, urls
from geopose_dist.data.reader import Reader, open_shards
from geopose_dist.data.sample import View
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.errors import UserError
from geopose_dist.infer import calibration
from geopose_dist.infer.calibration import Calibration
from geopose_dist.infer.fitting import TileSums, fit_curve, fit_factors, out_of_fold, tile_sums
from geopose_dist.infer.recipe import NetRecipe


@dataclass(frozen=True)
class CalibrateRecipe:
    """Fit a height calibration for a trained network."""

    run: Path
    """Run folder of `geopose train` (its best checkpoint), or a .safetensors file."""
    shards: str = ""
    """Shards to fit on; empty: those of the run's recipe."""
    split: str = ""
    """Split to fit on; empty: the run's validation split."""
    folds: int = 5
    """Parts of the split for the honest numbers; tiles of one place stay together."""
    batch: int = 4
    """Tiles predicted together."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs."""
    store: StoreRecipe = field(default_factory=StoreRecipe)
    """How shards behind a URL are reached."""
    net: NetRecipe = field(default_factory=NetRecipe)
    """How a batch is predicted; as it will be in `predict`."""

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(f"folds is {self.folds}; wanted 2 or more")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; wanted 1 or more")
        if self.net.calibration != "none":
            raise ValueError(f"net.calibration is {self.net.calibration}; wanted none while one is fitted")


def run(recipe: CalibrateRecipe) -> None:
    """Predict the split, fit, save, and print what it brings."""
    from geopose_dist.model.weights import find_checkpoint

    weights = find_checkpoint(recipe.run)
    shards, split = _place(recipe)
    tiles = _measure(recipe, weights, shards, split)
    honest = out_of_fold(tiles, recipe.folds)
    factors, (at, to) = fit_factors(tiles), fit_curve(tiles)
    facts = {"split": split, "tiles": len(tiles), "folds": recipe.folds, "out_of_fold": honest}
    found = Calibration(
        {city: round(factor, 6) for city, factor in factors.items()},
        at,
        to,
        calibration.sha256(weights),
        facts,
    )
    path = calibration.save(weights, found)
    for method, score in honest.items():
        gain = score["r2"] - honest["none"]["r2"]
        print(
            f"{method:7} R2 {score['r2']:.4f} ({gain:+.4f}), heights {score['agl_r2']:.4f}, flow "
            f"{score['vflow_r2']:.4f} on places that it was not fitted on"
        )
    best = max(honest, key=lambda method: honest[method]["r2"])
    advice = f"use it with --calibration {best}" if best != "none" else "it does not help here: leave it off"
    print(f"{path}: fitted on {len(tiles)} tiles of {split}; {advice}")


def _place(recipe: CalibrateRecipe) -> tuple[str, str]:
    """Shards and split to fit on, from the options or the run's recipe (UserError)."""
    told: dict[str, Any] = {}
    path = recipe.run / "recipe.yaml"
    if path.is_file():
        told = (yaml.safe_load(path.read_text()) or {}).get("data", {})
    shards, split = (
        recipe.shards or told.get("shards", ""),
        recipe.split or told.get("validation_split", "val"),
    )
    if not shards:
        raise UserError(f"--run {recipe.run}: no recipe.yaml that names shards there; name them by --shards")
    return str(shards), str(split)


def _measure(recipe: CalibrateRecipe, weights: Path, shards: str, split: str) -> list[TileSums]:
    import torch

    from geopose_dist.infer.predictor import Predictor

    device = recipe.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    shard_set = open_shards(shards, split, recipe.store)
    reader, reduced_by = Reader(shard_set), int(shard_set.manifest.recipe.get("reduce", 1))
    predictor = Predictor([weights], recipe.net, batch=recipe.batch, device=device)
    factor = predictor.reduction // reduced_by
    views = (reader.view(i) for i in range(len(reader)))
    found: list[TileSums] = []
    for batch in metrics_log.track(
        _batches(views, recipe.batch),
        total=-(-len(reader) // recipe.batch),
        label=f"calibrate on {urls.shown(shards)}",
        unit="batches",
    ):
        labelled = [view for view in batch if view.agl_m is not None and np.isfinite(view.agl_m).any()]
        if not labelled:
            continue
        heights, vectors, log_scales = predictor.answers(
            [view.rgb for view in labelled],
            [view.gsd_m for view in labelled],
            reduced_by=reduced_by,
            cities=[view.city for view in labelled],
        )
        for view, agl_m, vector, log_scale in zip(labelled, heights, vectors, log_scales, strict=True):
            assert view.agl_m is not None
            true_m = view.agl_m
            if factor > 1:
                rows, columns = (side // factor * factor for side in true_m.shape)
                true_m = resample.reduce_agl(np.ascontiguousarray(true_m[:rows, :columns]), factor)
            same = agl_m[: true_m.shape[0], : true_m.shape[1]].clip(0, recipe.net.agl_max_m)
            pose: dict[str, Any] = {}
            if view.scale_px_per_m is not None and view.angle_rad is not None:
                pose = {
                    "scale": math.exp(log_scale) * factor,
                    "true_scale": view.scale_px_per_m,
                    "direction": geometry.direction(geometry.angle_of(*map(float, vector))),
                    "true_direction": geometry.direction(view.angle_rad),
                }
            found.append(tile_sums(same, true_m, view.city, view.place or view.key, **pose))
    if not found:
        raise UserError(
            f"{urls.shown(shards)}: no tile of split {split} has known heights; name another by --split"
        )
    return found


def _batches(views: Iterable[View], size: int) -> Iterator[list[View]]:
    """Lists of up to `size` neighbouring tiles of one size."""
    batch: list[View] = []
    for view in views:
        if batch and (len(batch) == size or batch[0].rgb.shape != view.rgb.shape):
            yield batch
            batch = []
        batch.append(view)
    if batch:
        yield batch
