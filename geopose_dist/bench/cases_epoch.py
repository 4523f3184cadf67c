"""`geopose bench epoch`: how long an epoch takes with a recipe on these shards, and what bounds it.

Three measurements of one rank: the loader alone (the real one, with augmentation), the network alone (on one
batch that is on the device already), and the training loop itself, end to end, whose own metrics are read.
Each has a warm-up that does not count and `repeats` windows of `steps` steps. The verdict is computed from
the parts (`verdicts`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geopose_dist import pool
from geopose_dist.augment import transform_of
from geopose_dist.bench import verdicts
from geopose_dist.bench.harness import Row, Timing, timing
from geopose_dist.bench.recipe import BenchRecipe
from geopose_dist.data.batch import Batch, to_device
from geopose_dist.data.loader import TrainLoader, train_loader
from geopose_dist.data.reader import Reader, open_shards
from geopose_dist.data.samples import generator_for
from geopose_dist.data.workers import workers_for
from geopose_dist.runtime import StopRequest, join_world
from geopose_dist.train import loop
from geopose_dist.train.recipe import TrainRecipe
from geopose_dist.train.session import Session, open_session

WARM_UP_STEPS = 3
"""Steps before the first window: workers start, queues fill, the device chooses its algorithms."""
SAMPLES_LOOKED_AT = 8
"""Samples whose augmentation is timed apart."""


@dataclass(frozen=True)
class Rates:
    """Windows of one measurement.

    Attributes:
        tiles_per_s: one rate per window.
        facts: whatever else was seen, for the row.
    """

    tiles_per_s: list[float]
    facts: dict[str, Any]

    def timing(self) -> Timing:
        """Median seconds per tile and the spread."""
        return timing([1 / rate for rate in self.tiles_per_s])


def epoch(repeats: int, recipe: BenchRecipe, shards: str, run: TrainRecipe) -> list[Row]:
    """Tiles per second of loader, network and both, seconds per epoch, and the verdict."""
    wanted = for_bench(run, shards)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, StopRequest() as stop, join_world(wanted.device) as world:
        total = (1 + repeats) * recipe.steps  # the first window of the loop is its warm-up
        wanted = dataclasses.replace(wanted, out=folder, length=f"{total} steps", log_every=recipe.steps)
        session = open_session(wanted, world)
        session.validation = None
        data, batches = data_only(session, repeats, recipe.steps)
        compute = compute_only(session, batches, repeats, recipe.steps)
        both = end_to_end(session, stop)
        parts = parts_of(session, data, compute, both)
        facts = run_facts(session)
    for name, rates in (("loader alone", data), ("network alone", compute), ("end to end", both)):
        seconds = rates.timing()
        rows.append(
            {
                "case": f"epoch, {name}",
                "tiles_per_s": 1 / seconds.median_s,
                "spread": seconds.spread,
                "epoch_tiles": recipe.tiles,
                "epoch_s": recipe.tiles * seconds.median_s,
                **facts,
                **rates.facts,
            }
        )
    rows[-1]["share_of_network_alone"] = parts.both / parts.compute
    rows[-1]["bound_by"] = parts.bound()
    rows[-1]["verdict"] = verdicts.judge(parts)
    return rows


def for_bench(recipe: TrainRecipe, shards: str) -> TrainRecipe:
    """The recipe as it is measured: these shards, random weights, no saving and no validation on the way."""
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, shards=shards),
        model=dataclasses.replace(recipe.model, weights="none"),
        validation=dataclasses.replace(recipe.validation, every_epochs=0),
        checkpoint=dataclasses.replace(recipe.checkpoint, every_steps=2**40),
        init_from=None,
    )


def windows(step: Callable[[], object], tiles: int, repeats: int, steps: int) -> list[float]:
    """Tiles per second of `repeats` windows of `steps` calls of `step`, after the warm-up."""
    for _ in range(WARM_UP_STEPS):
        step()
    rates = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        rates.append(tiles * steps / (time.perf_counter() - began))
    return rates


def synchronize() -> None:
    """Wait for the GPU, if there is one: its work is only queued when a call returns."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bench_loader(session: Session) -> TrainLoader:
    """The loader of the session's recipe, endless."""
    recipe, world = session.recipe, session.world
    shard_set = open_shards(recipe.data.shards, recipe.data.train_split, recipe.data.store)
    return train_loader(
        shard_set,
        recipe.data,
        seed=recipe.seed,
        rank=world.rank,
        world_size=world.size,
        start_step=0,
        stop_step=2**40,
        transform=transform_of(recipe.augment, recipe.data.crop_px),
    )


def data_only(session: Session, repeats: int, steps: int) -> tuple[Rates, list[Batch]]:
    """The loader alone, with its processes' CPU time and bytes read; and one step's batches."""
    recipe = session.recipe
    loader = bench_loader(session)
    iterator: Iterator[list[Batch]] = iter(loader)
    try:
        batches = next(iterator)
        for _ in range(queued_steps(recipe)):  # what was made ready before the clock ran
            next(iterator)
        pids = loader.worker_pids() or [os.getpid()]
        began, cpu, active = time.perf_counter(), sum(map(cpu_s, pids)), sum(map(active_s, pids))
        rates = windows(lambda: next(iterator), recipe.data.global_batch, repeats, steps)
        passed, tiles = (
            time.perf_counter() - began,
            (WARM_UP_STEPS + repeats * steps) * recipe.data.global_batch,
        )
        busy = (sum(map(active_s, pids)) - active) / passed / len(pids)
        cpu_ms = 1e3 * (sum(map(cpu_s, pids)) - cpu) / tiles
    finally:
        loader.close()
    shard_set = open_shards(recipe.data.shards, recipe.data.train_split, recipe.data.store)
    tiles_per_s = 1 / timing([1 / rate for rate in rates]).median_s
    stored = float(np.mean(shard_set.index["length"]))
    facts = {
        "worker_busy": min(busy, 1.0),
        "worker_cpu_ms_per_tile": cpu_ms,
        "augment_share": augment_share(recipe),
        "stored_mb_per_tile": stored / 1e6,
        "read_mb_per_s": stored / 1e6 * tiles_per_s,
    }
    return Rates(rates, facts), batches


def queued_steps(recipe: TrainRecipe) -> int:
    """Steps that the loader keeps ready."""
    micro_batches = workers_for(recipe.data) * recipe.data.prefetch
    return -(-micro_batches * recipe.data.micro_batch // recipe.data.global_batch)


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def active_s(pid: int) -> float:
    """Seconds in which a process computed or waited for a core, rather than for bytes; see sched(7).

    On a busy machine a process that wants to compute gets less than a core, which is not the store's fault.
    """
    try:
        tasks = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    except FileNotFoundError:  # a thread ended between the listing and the reading
        return active_s(pid)
    return sum(int(running) + int(waiting) for running, waiting, _ in tasks) / 1e9 if tasks else cpu_s(pid)


def augment_share(recipe: TrainRecipe) -> float:
    """Share of a sample's CPU time that augmentation takes, on a few samples in this process."""
    reader = Reader(open_shards(recipe.data.shards, recipe.data.train_split, recipe.data.store))
    transform = transform_of(recipe.augment, recipe.data.crop_px)
    spent = {"read": 0.0, "augment": 0.0}
    for index in itertools.islice(itertools.cycle(range(len(reader))), SAMPLES_LOOKED_AT):
        began = time.process_time()
        view = reader.view(index)
        read = time.process_time()
        transform(view, generator_for(recipe.seed, 0, index))
        spent["read"] += read - began
        spent["augment"] += time.process_time() - read
    return spent["augment"] / max(sum(spent.values()), 1e-9)


def compute_only(session: Session, batches: list[Batch], repeats: int, steps: int) -> Rates:
    """The optimiser step on batches that are on the device already."""
    batches = [to_device(batch, session.world.device) for batch in batches]
    numbers = itertools.count()
    if session.world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        session.stepper.step(batches, next(numbers), session.world.rank)

    rates = windows(step, session.recipe.data.global_batch, repeats, steps)
    facts = {}
    if session.world.device.type == "cuda":
        facts["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return Rates(rates, facts)


def end_to_end(session: Session, stop: StopRequest) -> Rates:
    """The training loop itself, by its own metrics: one line a window, the first of which warms up."""
    loop.train(session, stop)
    lines = (Path(session.recipe.out) / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines][1:]
    waits = sorted(line["data_wait_share"] for line in metrics)
    return Rates([line["tiles_per_s"] for line in metrics], {"data_wait_share": waits[len(waits) // 2]})


def parts_of(session: Session, data: Rates, compute: Rates, both: Rates) -> verdicts.Parts:
    """The measured parts, for the verdict."""
    local_ranks = session.world.local_size
    return verdicts.Parts(
        data=1 / data.timing().median_s,
        compute=1 / compute.timing().median_s,
        both=1 / both.timing().median_s,
        wait_share=both.facts["data_wait_share"],
        workers=workers_for(session.recipe.data),
        worker_busy=data.facts["worker_busy"],
        augment_share=data.facts["augment_share"],
        cores=max(pool.usable_cores() // local_ranks, 1),
        on_gpu=session.world.device.type == "cuda",
    )


def run_facts(session: Session) -> Row:
    """What a row says of the recipe that was measured."""
    recipe, world = session.recipe, session.world
    return {
        "encoder": recipe.model.encoder,
        "crop_px": recipe.data.crop_px or "whole tiles",
        "batch": recipe.data.global_batch,
        "micro_batch": recipe.data.micro_batch,
        "precision": recipe.precision,
        "augment": recipe.augment.preset,
        "workers": workers_for(recipe.data),
        "device": world.device.type,
    }


CASES = {"epoch": epoch}
