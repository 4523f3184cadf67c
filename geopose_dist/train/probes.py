"""What `geopose doctor --distributed` measures: reading from each host, clocks, and the exchange between ranks."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from geopose_dist.data import catalogue, staging
from geopose_dist.data.reader import Reader, open_shards
from geopose_dist.errors import UserError
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.runtime import World
from geopose_dist.train import checkpoint
from geopose_dist.train.place import local_folder
from geopose_dist.train.recipe import TrainRecipe

READ_S = 3.0
READ_BYTES = 256 << 20
"""Reading ends after so much time or so many bytes, whichever comes first."""
PINGS = 7
ROUNDS = 20
LEAST_FREE_BYTES = 1 << 30
"""A cache on a disk with less than this keeps next to nothing."""


def read_speed(recipe: TrainRecipe) -> dict[str, float]:
    """MB/s of this process reading samples spread over the training split, checked, not decoded (UserError).

    What the kernel or the cache holds already counts as it comes: run it twice to see the difference.
    """
    data = recipe.data
    if not data.shards:
        return {}
    shard_set = open_shards(data.shards, data.train_split, data.store)
    reader = Reader(shard_set)
    rows = range(0, len(reader), max(1, len(reader) // 256))
    size, count, began = 0, 0, time.monotonic()
    reader.prefetch(rows)
    for row in rows:
        size, count = size + len(reader.raw(row)), count + 1
        if time.monotonic() - began > READ_S or size > READ_BYTES:
            break
    passed = max(time.monotonic() - began, 1e-6)
    return {"mb_per_s": size / passed / 1e6, "samples": count, "mb": size / 1e6}


def disks(recipe: TrainRecipe, writes_checkpoints: bool) -> tuple[dict[str, float], list[str]]:
    """Free GB where checkpoints and cached shards go, and what is too little, as sentences."""
    folder, problems = local_folder(recipe), []
    free = {"out_gb": shutil.disk_usage(_nearest(folder)).free / 1e9}
    if writes_checkpoints:
        each = checkpoint.size_bytes(GeoposeNet(recipe.model), recipe.ema_decay > 0)
        in_store = folder != Path(recipe.out)
        problems += _told(
            lambda: checkpoint.check_room(folder, each, 1 if in_store else recipe.checkpoint.keep)
        )
    data = recipe.data
    if not data.shards:
        return free, problems
    root = catalogue.locate(data.shards, data.store)[1]
    staged = data.store.stage == "node"
    if staged or "://" in root:
        cache = catalogue.cache_root(data.store)
        free["cache_gb"] = shutil.disk_usage(_nearest(cache)).free / 1e9
        need = LEAST_FREE_BYTES
        if staged:
            shards = staging.shards_of(open_shards(data.shards, data.train_split, data.store))
            here = staging.folder_of(data.store)
            need = sum(shard.bytes for shard in shards if not (here / f"{shard.sha256}.tar").is_file())
        if free["cache_gb"] * 1e9 < need:
            what = "staged shards need" if staged else "a cache of shards wants at least"
            problems.append(
                f"{cache}: the disk has {free['cache_gb']:.3f} GB free, and {what} {need / 1e9:.3f} GB; free some "
                "space, or name another data.store.cache_dir"
            )
    return free, problems


def all_reduce(world: World) -> dict[str, float]:
    """Latency (us, of 4 bytes) and bandwidth (GB/s) of a sum over all ranks, by the group that gradients use.

    Bandwidth is the bus's: bytes a rank must send and receive in the best algorithm, by the median time.
    """
    if world.size == 1:
        return {}
    small = torch.zeros(1, device=world.device)
    large = torch.zeros((64 if world.device.type == "cuda" else 16) << 18, device=world.device)
    latency_s = statistics.median(_timed(small, world) for _ in range(ROUNDS))
    time_s = statistics.median(_timed(large, world) for _ in range(5))
    share = 2 * (world.size - 1) / world.size
    return {
        "latency_us": latency_s * 1e6,
        "bus_gb_per_s": share * large.nbytes / time_s / 1e9,
        "mb": large.nbytes / 1e6,
    }


def _timed(tensor: torch.Tensor, world: World) -> float:
    world.barrier()
    _settle(world)
    began = time.perf_counter()
    dist.all_reduce(tensor)
    _settle(world)
    return time.perf_counter() - began


def _settle(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def clock_skew_s(world: World) -> list[float]:
    """How far each rank's clock is ahead of rank 0's, in seconds, asked as NTP does; the same list on all ranks.

    The error is at most half of the fastest answer's time.
    """
    skews = torch.zeros(world.size, dtype=torch.float64)
    for rank in range(1, world.size):
        here = torch.zeros(1, dtype=torch.float64)
        if world.rank == rank:
            for _ in range(PINGS):
                dist.recv(here, 0, group=world.control)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), 0, group=world.control)
        elif world.is_first:
            answers = []
            for _ in range(PINGS):
                began = time.time()
                dist.send(here, rank, group=world.control)
                dist.recv(here, rank, group=world.control)
                ended = time.time()
                answers.append((ended - began, here.item() - (began + ended) / 2))
            skews[rank] = min(answers)[1]
    return [float(skew) for skew in world.sum(skews)]


def _nearest(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())


def _told(check: Any) -> list[str]:
    try:
        check()
    except UserError as error:
        return [str(error)]
    return []
