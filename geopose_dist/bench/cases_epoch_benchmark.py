"""Case `epoch_benchmark`: the public benchmark's way end to end, to stand beside `epoch` in one run.

Tiles of the same shards as loose LZW TIFFs, its augmentation one operation after another, float32 batches from a
stock DataLoader with four workers, and its loop: eager float32, NCHW, every loss read back. On a GPU its products
may use TF32, as its users would switch on. Batch and network are the recipe's; crops are cut at the corner.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geopose_dist.bench import loader_baselines
from geopose_dist.bench.cases_epoch import windows
from geopose_dist.bench.cases_step import benchmark_step, fresh_net, plain, with_batch
from geopose_dist.bench.harness import Row, check, timing
from geopose_dist.bench.recipe import BenchRecipe
from geopose_dist.data.reader import Reader, open_shards
from geopose_dist.data.sample import View
from geopose_dist.runtime import join_world
from geopose_dist.train.recipe import TrainRecipe

WORKERS = 4
MOST_TILES = 64


def epoch_benchmark(repeats: int, recipe: BenchRecipe, shards: str, run: TrainRecipe) -> Row:
    """Tiles per second of the benchmark's loop from loose TIFFs, and seconds per epoch."""
    base = with_batch(run, run.data.micro_batch)
    with tempfile.TemporaryDirectory() as folder, join_world(base.device) as world:
        views = labelled(shards, run)
        loader_baselines.write_loose(Path(folder) / "loose", views)
        fast = world.device.type == "cuda"
        net = fresh_net(dataclasses.replace(plain(base), precision="tf32" if fast else "fp32"), world.device)
        one_step = benchmark_step(net, base)
        batches = loaded(Path(folder) / "loose", base)

        def step() -> None:
            told = {name: value.to(world.device) for name, value in next(batches).items() if name != "key"}
            labels = (told["agl_m"][:, None], told["magnitude_px"][:, None], told["direction"], told["scale"])
            losses = one_step(told["rgb"] * 255, *labels)
            check(bool(np.isfinite(losses).all()), f"the benchmark's losses are {losses}")

        rates = windows(step, base.data.micro_batch, repeats, recipe.steps)
    seconds = timing([1 / rate for rate in rates])
    return {
        "case": "epoch, the benchmark's way",
        "tiles_per_s": 1 / seconds.median_s,
        "spread": seconds.spread,
        "epoch_tiles": recipe.tiles,
        "epoch_s": recipe.tiles * seconds.median_s,
        "encoder": base.model.encoder,
        "crop_px": base.data.crop_px or "whole tiles",
        "batch": base.data.micro_batch,
        "precision": "tf32" if fast else "fp32",
        "augment": "benchmark",
        "workers": WORKERS,
        "device": world.device.type,
    }


def labelled(shards: str, run: TrainRecipe) -> list[View]:
    """The first tiles with height and pose, of one size."""
    reader = Reader(open_shards(shards, run.data.train_split, run.data.store))
    views = (reader.view(index) for index in range(min(MOST_TILES, len(reader))))
    found = [view for view in views if view.agl_m is not None and view.pose is not None]
    check(bool(found), f"{shards} holds no tile with height and pose")
    return [view for view in found if view.size == found[0].size]


def loaded(folder: Path, run: TrainRecipe) -> Iterator[dict[str, Any]]:
    """Endless batches of a stock DataLoader."""
    from torch.utils.data import DataLoader

    tiles: Any = Cut(loader_baselines.LooseTiles(folder, True), run.data.crop_px)
    size = run.data.micro_batch
    loader: Any = DataLoader(tiles, batch_size=size, num_workers=WORKERS, multiprocessing_context="fork")
    return iter(loader)


class Cut:
    """The tiles' upper left corners; whole tiles without a side."""

    def __init__(self, tiles: Any, side: int | None) -> None:
        self.tiles, self.side = tiles, side

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tile: dict[str, Any] = self.tiles[index]
        maps = ("rgb", "agl_m", "magnitude_px")
        cut = {name: np.ascontiguousarray(tile[name][..., : self.side, : self.side]) for name in maps}
        return {name: torch.as_tensor(value) for name, value in {**tile, **cut}.items() if name != "key"}


CASES = {"epoch_benchmark": epoch_benchmark}
