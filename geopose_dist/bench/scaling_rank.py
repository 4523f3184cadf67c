"""What `geopose bench scaling` runs on each rank: `torchrun ... -m geopose_dist.bench.scaling_rank FILE.json`.

All ranks measure at the same time, as they would train: micro-batches without any exchange (one and two, which
tells a micro-batch from the update), the whole step under DDP, and all-reduces of a few sizes. The first rank
writes what all of them saw beside the file, as FILE.result.json.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from geopose_dist import config, files
from geopose_dist.bench.cases_epoch import synchronize
from geopose_dist.bench.cases_step import fresh_net, made_batch
from geopose_dist.data.batch import Batch, to_device
from geopose_dist.runtime import World, join_world
from geopose_dist.train.optim import make_optimizer
from geopose_dist.train.recipe import TrainRecipe
from geopose_dist.train.step import Stepper

WARM_UP = 2
SIZES = (64, 2**16, 2**20, 2**23)
"""Bytes of the all-reduces beside the gradients' own."""


def main(path: Path) -> None:
    """Measure as the file says and write the result."""
    asked = json.loads(path.read_text())
    recipe: TrainRecipe = config.load_dict(TrainRecipe, asked["recipe"], where=str(path))
    with join_world(recipe.device) as world:
        result = measure(recipe, world, asked["steps"], asked["repeats"])
        if world.is_first:
            files.write_bytes(path.with_suffix(".result.json"), json.dumps(result).encode())
        world.barrier()


def measure(recipe: TrainRecipe, world: World, steps: int, repeats: int) -> dict[str, Any]:
    """Seconds of micro-batch, update, step and exchanges: medians over repeats, the slowest rank's or the mean."""
    batch = to_device(made_batch(recipe), world.device)
    alone = stepper(recipe, dataclasses.replace(world, size=1, control=None))
    one = times(_steps(alone, [batch]), world, steps, repeats)
    two = times(_steps(alone, [batch, batch]), world, steps, repeats)
    del alone
    gradients = 0
    whole = [one]
    if world.size > 1:
        together = stepper(recipe, world)
        gradients = sum(p.numel() * p.element_size() for p in together.net.parameters() if p.requires_grad)
        whole.append(times(_steps(together, [batch]), world, steps, repeats))
        del together
    exchanges = {}
    for size in (*SIZES, gradients):
        if world.size > 1 and size not in exchanges:
            buffer = torch.zeros(size // 4, device=world.device)
            seconds = times(lambda buffer=buffer: dist.all_reduce(buffer), world, steps, repeats)  # type: ignore[misc]
            exchanges[size] = statistics.median(max(window) for window in seconds)
    first, second = (statistics.median(statistics.mean(window) for window in kind) for kind in (one, two))
    micro_batch_s = max(second - first, first / 2)
    slowest = [max(window) for window in whole[-1]]
    return {
        "ranks": world.size,
        "micro_batch_s": micro_batch_s,
        "update_s": first - micro_batch_s,
        # Of the same rank over time: what a rank is late by in a step is not always the same rank's lot.
        "spread": statistics.pstdev([s for window in one for s in window]) / first,
        "gradient_bytes": gradients,
        "bucket_bytes": min(gradients, int(recipe.ddp.bucket_mb * 2**20)),
        "step_s": statistics.median(slowest),
        "step_spread": statistics.pstdev(slowest) / statistics.median(slowest),
        "exchanges": exchanges,
    }


def stepper(recipe: TrainRecipe, world: World) -> Stepper:
    """A stepper on random weights, of this rank alone or of all of them."""
    net = fresh_net(recipe, world.device)
    return Stepper(recipe, net, make_optimizer(recipe.optim, net, world.device), world, ("JAX",))


def _steps(kind: Stepper, batches: list[Batch]) -> Callable[[], object]:
    numbers = itertools.count()
    return lambda: kind.step(batches, next(numbers), kind.world.rank)


def times(call: Callable[[], object], world: World, steps: int, repeats: int) -> list[list[float]]:
    """[repeats][ranks] seconds per call: every window starts together."""
    for _ in range(WARM_UP):
        call()
    found = []
    for _ in range(repeats):
        synchronize()
        world.barrier()
        began = time.perf_counter()
        for _ in range(steps):
            call()
        synchronize()
        mine = torch.tensor([(time.perf_counter() - began) / steps], dtype=torch.float64)
        found.append([float(seconds) for seconds in world.gather(mine)])
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
