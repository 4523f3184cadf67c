"""Case `synth`: tiles of full size rendered per second by one core, beside a march of all rays together in NumPy.

A row per city: a place is built and its views are rendered (shadows, surfaces, colours, sensor, labels), encoding left
out; the place's share of a view is told apart. The baseline lowers all rays of a smaller picture of the same scene by
steps of `STEP_M`, then raises all from what they met towards the sun, and looks colours up: no texture, windows,
smooth edges or sensor, so it does less. Then what encoding adds: the challenge's files, and samples of shards.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from geopose_dist.bench.harness import Row, check, pinned, timing

CITIES = ("ARG", "ATL", "JAX", "OMA")
TILE_PX = 2048
VIEWS = 8
"""Views that share a place; the challenge has 20 to 40."""
BASE_PX = 384
"""Side of the baseline's picture; its time is scaled by the number of pixels."""
STEP_M = 0.25
SAMPLES = (("shards, QOI", "qoi"), ("shards, HTJ2K", "htj2k"))
QUICK: dict[str, Any] = {
    "CITIES": ("OMA",),
    "TILE_PX": 192,
    "VIEWS": 2,
    "BASE_PX": 64,
    "SAMPLES": SAMPLES[:1],
}
SEED, PLACE = 0, 1
F32 = npt.NDArray[np.float32]


def synth(repeats: int) -> list[Row]:
    """Rendering by city, then rendering with encoding over all cities."""
    rows, rendering = [], []
    with pinned():
        for city in CITIES:
            row, seconds = rendered(city, repeats)
            rows.append(row)
            rendering.append(seconds)
        rows += [encoded(*how, float(np.mean(rendering))) for how in [("files (J2K, TIFF)", ""), *SAMPLES]]
    return rows


def rendered(city: str, repeats: int) -> tuple[Row, float]:
    """A row of a city, and the CPU seconds of a tile, the share of the place included."""
    from geopose_dist.kernels import render
    from shards import synth_look, synth_scene, synth_tiles
    from shards.synth_districts import keyed

    began = time.process_time()
    scene = synth_scene.build(city, TILE_PX, SEED, PLACE, relief=1.0)
    build_s = time.process_time() - began
    views, wide, last = [], 0.0, None
    for view in range(min(VIEWS, repeats + 1)):
        began = time.process_time()
        rng = keyed(SEED, PLACE, 5, view)
        camera = synth_tiles.view_camera(city, TILE_PX, SEED, PLACE, view)
        day = synth_look.draw_day(city, rng)
        picture = scene.picture(camera, scene.looks(day))
        synth_look.develop(picture.radiance, day, rng)
        scene.label_cm(camera, picture, rng)
        views.append(time.process_time() - began)
        wide, last = float(np.mean(picture.kind == render.WALL)), (camera, day)
    assert last is not None
    camera, day = last
    affine = camera.affine(
        (BASE_PX, BASE_PX), scene.plan.cell, scene.plan.height.shape, scene.plan.ground_at(0, 0)
    )
    small = render.render(scene.terrain, scene.looks(day), affine, BASE_PX, BASE_PX)
    began = time.process_time()
    height, lit = march(scene, affine, day.light)
    base_s = (time.process_time() - began) * (TILE_PX / BASE_PX) ** 2
    row, col = small.row.astype(int), small.col.astype(int)
    ground = 0.0 if scene.terrain.ground is None else scene.terrain.ground[row, col]
    near = np.mean(np.abs(small.agl_m + ground - height) <= STEP_M + 0.05)
    check(bool(near > 0.9), f"{city}: heights agree with the march in NumPy at {near:.1%} of the pixels only")
    shadows = np.mean(lit == small.lit)
    check(
        bool(shadows > 0.75),
        f"{city}: light agrees with the march in NumPy at {shadows:.1%} of the pixels only",
    )
    spent = timing(views[1:] or views)  # the first has the memory to find
    tile_s = spent.median_s + build_s / VIEWS
    return {
        "name": f"render {city}",
        "tiles_per_s": 1 / tile_s,
        "spread": spent.spread,
        "view_s": spent.median_s,
        "place_s": build_s,
        "views_of_a_place": VIEWS,
        "facade_share": wide,
        "tile_px": TILE_PX,
        "time": "CPU",
        "baseline": "march in NumPy",
        "baseline_tiles_per_s": 1 / base_s,
        "speedup": base_s / tile_s,
        "verdict": f"{city}: a tile takes {tile_s:.2f} CPU s with its share of the place, {base_s / tile_s:.0f} times "
        "as fast as a march in NumPy",
    }, tile_s


def march(scene: Any, camera: Any, light: Any) -> tuple[F32, npt.NDArray[np.uint8]]:
    """(surface heights, 1 where lit) of BASE_PX x BASE_PX rays that go down and towards the sun step by step."""
    terrain = scene.terrain
    side = terrain.height.shape[0]
    y, x = (axis.ravel() for axis in np.mgrid[0:BASE_PX, 0:BASE_PX].astype(np.float64))
    found = np.zeros(x.size, np.float32)
    rays = np.arange(x.size)
    for h in np.arange(terrain.top, -STEP_M, -STEP_M):
        col, row = camera.cells(x[rays], y[rays], h)
        hit = terrain.height[row.astype(int).clip(0, side - 1), col.astype(int).clip(0, side - 1)] >= h
        found[rays[hit]] = h
        rays = rays[~hit]
    col, row = camera.cells(x, y, found)
    run_col, run_row = light.run(scene.plan.cell)
    lit = np.ones(x.size, np.uint8)
    rays = np.arange(x.size)
    for climb in np.arange(2 * STEP_M, terrain.top - float(found.min()), STEP_M):
        c = (col[rays] + climb * run_col).astype(int).clip(0, side - 1)
        r = (row[rays] + climb * run_row).astype(int).clip(0, side - 1)
        dark = terrain.height[r, c] > found[rays] + climb + STEP_M
        lit[rays[dark]] = 0
        rays = rays[~dark]
    thing = scene.plan.ids[row.astype(int).clip(0, side - 1), col.astype(int).clip(0, side - 1)]
    colours = scene.plan.objects()[thing, :3] * (0.3 + lit[:, None])
    assert np.isfinite(colours).all()
    return found.reshape(BASE_PX, BASE_PX), lit.reshape(BASE_PX, BASE_PX)


def encoded(name: str, codec: str, render_s: float) -> Row:
    """Tiles of all cities encoded in one way, with the rendering that was measured before; nothing is written."""
    from shards import synth_shards, synth_tiles
    from shards.synth_faults import FaultRecipe

    seconds, megabytes = [], []
    for number, city in enumerate(CITIES):
        tile = synth_tiles.TileName(city, PLACE, 0, f"tile{number}", False)
        job = synth_tiles.Job(Path(), TILE_PX, SEED, city, PLACE, (tile,), 1.0, FaultRecipe())
        (made,) = synth_tiles.render(job)
        began = time.process_time()
        if codec:
            how = synth_shards.SampleJob(job, 1, codec, "lerc", Path())
            parts = list(synth_shards.encoded(made, how).members.values())
        else:
            parts = [synth_tiles.encode_j2k(made.rgb), synth_tiles.encode_tif(made.cm)]
        seconds.append(time.process_time() - began)
        megabytes.append(sum(map(len, parts)) / 1e6)
    encode_s = float(np.mean(seconds))
    rate = 1 / (render_s + encode_s)
    return {
        "name": f"render and encode: {name}",
        "tiles_per_s": rate,
        "spread": timing(seconds).spread,
        "encode_s": encode_s,
        "render_s": render_s,
        "mb_per_tile": float(np.mean(megabytes)),
        "tile_px": TILE_PX,
        "time": "CPU",
        "verdict": f"{name}: encoding adds {encode_s:.2f} CPU s to a tile, {rate:.2f} tiles/s a core",
    }


CASES: dict[str, Callable[..., list[Row]]] = {"synth": synth}
