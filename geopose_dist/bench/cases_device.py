"""Cases `device_augment` and `memory`: what augmentation costs a worker or the device, and how much memory a sample.

`device_augment` takes the same draws both ways: all of it in a worker, or drawn and cut in the worker and finished on
the device (the GPU if there is one, else this CPU, which tells that the path works and not what a GPU would do).
`memory` makes a sample of 1024 x 1024 in a process of its own (`one_sample`).
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from geopose_dist.augment import AugmentRecipe, apply, defer, draw
from geopose_dist.bench.cases_kernels import Row, scene
from geopose_dist.data.sample import View

TILES = 4
TILE_PX, CROP_PX = 1024, 512
QUICK = {"TILES": 2, "TILE_PX": 192, "CROP_PX": 96}
LIMIT_MB = 40.0
"""Extra memory that a sample may take at most."""


def bench_device_augment(repeats: int) -> list[Row]:
    """Milliseconds per tile of a worker and of the device, for whole tiles and for crops, preset strong."""
    return [_row(crop_px, repeats) for crop_px in (None, CROP_PX)]


def _row(crop_px: int | None, repeats: int) -> Row:
    import torch

    from geopose_dist.bench.harness import check, timing
    from geopose_dist.data.batch import Batch, pack, to_device
    from geopose_dist.model import device_augment

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = AugmentRecipe(
        "strong", noise=0.0
    )  # the noise is the device's own: without it both give the same bytes
    views = [_centimetres(scene(TILE_PX, seed)) for seed in range(TILES)]
    draws = [
        draw(recipe, np.random.Generator(np.random.Philox(key=[9, i])), view, crop_px)
        for i, view in enumerate(views)
    ]

    def packed(make: Callable[..., View]) -> Batch:
        made = [make(view, drawn) for view, drawn in zip(views, draws, strict=True)]
        return pack(made, ["BEN"], range(TILES), [0] * TILES)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    batch = to_device(packed(defer), device)
    wanted, done = packed(apply), device_augment.finish(batch)
    check(torch.equal(done.rgb.cpu(), wanted.rgb), f"{device.type} makes other pixels than a worker")
    same = torch.equal(done.agl_cm.cpu(), wanted.agl_cm.to(torch.int32))
    check(same, f"{device.type} makes other heights than a worker")
    seconds: dict[str, list[float]] = {"worker": [], "left": [], "device": []}
    for _ in range(repeats):
        for name, make in (("worker", apply), ("left", defer)):
            began = time.thread_time()
            packed(make)
            seconds[name].append(time.thread_time() - began)
        wait()
        began = time.perf_counter()
        device_augment.finish(batch)
        wait()
        seconds["device"].append(time.perf_counter() - began)
    worker, left, there = (timing(seconds[name]) for name in ("worker", "left", "device"))
    saved_ms = (worker.median_s - left.median_s) * 1e3 / TILES
    what = "whole tiles" if crop_px is None else f"crops of {crop_px}"
    return {
        "name": f"{what} of {TILE_PX} px, strong",
        "worker_ms": worker.median_s * 1e3 / TILES,
        "worker_ms_where_device": left.median_s * 1e3 / TILES,
        "device_ms": there.median_s * 1e3 / TILES,
        "spread": max(worker.spread, left.spread, there.spread),
        "shipped_mb": (batch.rgb.nbytes + batch.agl_cm.nbytes) / 1e6 / TILES,
        "shipped_mb_where_workers": (wanted.rgb.nbytes + wanted.agl_cm.nbytes) / 1e6 / TILES,
        "cores_saved_at_100_tiles_per_s": saved_ms / 10,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "repeats": repeats,
        "checked": "the same bytes",
        "verdict": f"{what}: the device saves {saved_ms / 10:.2f} cores at 100 tiles/s",
    }


def _centimetres(view: View) -> View:
    """The view with heights in whole centimetres, as shards hold them."""
    assert view.agl_m is not None
    return dataclasses.replace(view, agl_m=np.rint(view.agl_m * 100).astype(np.float32) / np.float32(100))


def bench_memory() -> list[Row]:
    """Most extra memory of reading, decoding, augmenting (everything on) and packing one sample."""
    from geopose_dist.bench.harness import check
    from shards.pack import PackRecipe
    from shards.pack import run as run_pack
    from shards.synth import SynthRecipe
    from shards.synth import run as run_synth

    with tempfile.TemporaryDirectory() as folder:
        shards = []
        for side in (64, TILE_PX):
            tiles, out = Path(folder, f"tiles-{side}"), Path(folder, f"shards-{side}")
            run_synth(
                SynthRecipe(tiles, places=1, views=1, size=side, test_places=0, workers=1, cities=["ARG"])
            )
            run_pack(PackRecipe(source=str(tiles), out=str(out), reduce=1))
            shards.append(str(out))
        facts: dict[str, Any] = json.loads(
            subprocess.run(
                [sys.executable, "-m", "geopose_dist.bench.one_sample", *shards],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
    check(facts["arrays_mb"] >= facts["batch_mb"], "a sample cannot take less memory than its batch")
    most = max(facts["resident_mb"], facts["arrays_mb"])
    verdict = f"one sample of {TILE_PX} x {TILE_PX} takes {most:.1f} MB at most, of {LIMIT_MB:g} allowed"
    return [{"name": f"one sample of {TILE_PX} px", **facts, "limit_mb": LIMIT_MB, "verdict": verdict}]


CASES: dict[str, Callable[..., list[Row]]] = {"device_augment": bench_device_augment, "memory": bench_memory}
