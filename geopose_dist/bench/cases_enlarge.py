"""What becomes of heights when a reduced network's answer is enlarged: nearest, bilinear, by slopes, guided.

A trained network predicts tiles whose truth is known; each way of enlarging the same answers is scored by the
official scorer at full resolution, once on the network's heights and once on the true ones, reduced: how much a way
loses with a perfect network.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np

from geopose_dist import geometry
from geopose_dist.bench.harness import Row
from geopose_dist.bench.recipe import BenchRecipe
from geopose_dist.data import resample
from geopose_dist.data.sample import U8
from geopose_dist.errors import UserError
from geopose_dist.evaluate import predictions as files
from geopose_dist.evaluate import score
from geopose_dist.geometry import F32
from geopose_dist.infer import enlarge
from shards import layouts

Enlarge = Callable[[F32, int, tuple[int, int], U8], F32]


def nearest(agl_m: F32, factor: int, size: tuple[int, int], rgb: U8) -> F32:
    """Every reduced pixel as a block, as the benchmark does."""
    return agl_m.repeat(factor, 0).repeat(factor, 1)[: size[0], : size[1]]


def blurred(agl_m: F32, factor: int, size: tuple[int, int], rgb: U8) -> F32:
    """Bilinear, then two box filters as wide as those of the guided way, which do not look at the image."""
    side = (2 * enlarge.GUIDE_RADIUS_PX + 1,) * 2
    large = enlarge.enlarge(agl_m, factor, size, "bilinear")
    return np.asarray(cv2.boxFilter(cv2.boxFilter(large, -1, side), -1, side), np.float32)


def ours(way: str) -> Enlarge:
    """A way that `geopose predict` offers."""
    return lambda agl_m, factor, size, rgb: enlarge.enlarge(agl_m, factor, size, way, rgb)


WAYS: dict[str, Enlarge] = {
    "nearest": nearest,
    "bilinear": ours("bilinear"),
    "slopes": ours("slopes"),
    "bilinear, blurred": blurred,
    "guided": ours("guided"),
}


def enlarge_case(recipe: BenchRecipe, repeats: int) -> list[Row]:
    """Scores of the ways on `data.tiles`, predicted by `data.checkpoint`."""
    from geopose_dist.infer.predictor import Predictor
    from geopose_dist.infer.recipe import NetRecipe

    if not (recipe.data.checkpoint and recipe.data.tiles):
        raise UserError(
            "bench enlarge needs --data.checkpoint, a trained network, and --data.tiles, labelled tiles"
        )
    predictor = Predictor([Path(recipe.data.checkpoint)], NetRecipe(), batch=1)
    factor = predictor.reduction
    tiles = [tile for tile in layouts.read_layout(Path(recipe.data.tiles)) if tile.agl and tile.vflow]
    seconds = dict.fromkeys(WAYS, 0.0)
    with TemporaryDirectory() as folder:
        for tile in tiles:
            rgb, true_m, pose = layouts.load_rgb(tile), layouts.load_agl_m(tile), layouts.load_pose(tile)
            assert true_m is not None
            assert pose is not None
            size = (rgb.shape[0], rgb.shape[1])
            agl_m, vectors, log_scales = predictor.answers([rgb], [tile.gsd_m], cities=[tile.city])
            angle = geometry.angle_of(*map(float, vectors[0]))
            scale = float(np.exp(log_scales[0])) * factor
            filled = np.nan_to_num(true_m)
            perfect = resample.reduce_agl(np.ascontiguousarray(filled), factor)
            _write(Path(folder) / "truth", tile.key, true_m, *pose)
            for name, way in WAYS.items():
                began = time.process_time()
                for _ in range(repeats):
                    large = way(agl_m[0].clip(0), factor, size, rgb)
                seconds[name] += (time.process_time() - began) / repeats
                _write(Path(folder) / name, tile.key, large.clip(0), scale, angle)
                ideal = way(perfect, factor, size, rgb)
                _write(Path(folder) / f"{name}-perfect", tile.key, ideal.clip(0), *pose)
        rows = []
        for name in WAYS:
            found, ideal_score = (
                score(Path(folder) / kind, Path(folder) / "truth") for kind in (name, f"{name}-perfect")
            )
            rows.append(
                {
                    "way": name,
                    "agl_r2": _mean(found, "agl_r2"),
                    "r2": found["r2"],
                    "mean_agl_error_m": _mean(found, "mean_agl_error"),
                    "perfect_agl_r2": _mean(ideal_score, "agl_r2"),
                    "perfect_error_m": _mean(ideal_score, "mean_agl_error"),
                    "ms_per_tile": seconds[name] / len(tiles) * 1e3,
                    "tiles": len(tiles),
                }
            )
    return rows


def _write(folder: Path, key: str, agl_m: F32, scale: float, angle: float) -> None:
    folder.mkdir(exist_ok=True)
    heights, _ = geometry.agl_cm_from_m(agl_m, unknown_allowed=True)
    (folder / f"{key}_AGL.tif").write_bytes(files.encode_agl(heights))
    (folder / f"{key}_VFLOW.json").write_bytes(files.encode_vflow(scale, angle))


def _mean(scores: dict[str, object], name: str) -> float:
    cities = scores["cities"]
    assert isinstance(cities, dict)
    return float(np.mean([city[name] for city in cities.values()]))


CASES = {"enlarge": enlarge_case}
