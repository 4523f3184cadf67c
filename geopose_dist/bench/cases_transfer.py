"""Case `transfer`: does a network trained on synthetic tiles rank the heights of real pictures?

Orthophotos with lidar heights (`data.pictures`) are predicted at several enlargements, because they do not tell their
ground pixel, and Spearman's rank correlation of predicted and true heights is told for each: 0 is chance. Its
interval (95 %) comes from drawing blocks of 16 x 16 pixels with replacement, since neighbours are no independent
witnesses. Beside it stands what darkness alone would give: trees and shadows are dark, so that is no bad guess.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from geopose_dist.bench.harness import BenchRecipe, Row
from geopose_dist.errors import UserError
from geopose_dist.geometry import F32, F64
from shards import layouts

ZOOMS = (0.5, 1.0, 2.0)
"""Pixels that the network sees per pixel of a picture, along a side."""
BLOCK_PX = 16
DRAWS = 2000


def transfer(recipe: BenchRecipe) -> list[Row]:
    """Rank correlations by picture and zoom, and their means over pictures (UserError: nothing to predict with)."""
    if not (recipe.data.checkpoint and recipe.data.pictures):
        raise UserError(
            "bench transfer needs --data.checkpoint, a trained network, and --data.pictures, a folder of "
            "orthophotos KEY_RGB.tif with heights KEY_AGL.tif"
        )
    tiles = [tile for tile in layouts.read_layout(Path(recipe.data.pictures)) if tile.agl]
    if not tiles:
        raise UserError(
            f"{recipe.data.pictures}: no picture has heights KEY_AGL.tif; nothing to compare with"
        )
    from geopose_dist.infer.predictor import Predictor
    from geopose_dist.infer.recipe import NetRecipe

    net = NetRecipe(enlarge="bilinear", window=4096, overlap=0)
    predictor = Predictor([Path(recipe.data.checkpoint)], net, batch=1)
    rows: list[Row] = []
    for zoom in ZOOMS:
        sums: list[F64] = []
        darks: list[F64] = []
        for tile in tiles:
            rgb, true_m = layouts.load_rgb(tile), layouts.load_agl_m(tile)
            assert true_m is not None
            known = np.isfinite(true_m)
            answer = predictor.predict([_resized(rgb, zoom * predictor.reduction)], [None])[0]
            if answer is None:
                raise UserError(f"{tile.rgb}: the network answers no finite heights; name another checkpoint")
            guess = cv2.resize(answer.agl_m, true_m.shape[::-1], interpolation=cv2.INTER_AREA)
            dark = -cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY).astype(np.float32)
            sums.append(block_sums(np.asarray(guess, np.float32), true_m))
            darks.append(block_sums(dark, true_m))
            row = {"picture": tile.key, "zoom": zoom, "known_px": int(known.sum())}
            rows.append(row | interval([sums[-1]]) | {"rho_of_darkness": rho_of(darks[-1:])})
        rows.append(
            {"picture": f"mean of {len(tiles)}", "zoom": zoom}
            | interval(sums)
            | {"rho_of_darkness": rho_of(darks)}
        )
    means = [row for row in rows if str(row["picture"]).startswith("mean of")]
    rows[-1]["verdict"] = (
        "ranks of heights in real pictures: "
        + ", ".join(
            f"{row['rho']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f}) at zoom {row['zoom']:g}"
            for row in means
        )
        + "; 0 is chance"
    )
    return rows


def _resized(rgb: npt.NDArray[np.uint8], zoom: float) -> npt.NDArray[np.uint8]:
    """The picture at `zoom` pixels per pixel, along a side."""
    how = cv2.INTER_CUBIC if zoom > 1 else cv2.INTER_AREA
    size = max(1, round(rgb.shape[1] * zoom)), max(1, round(rgb.shape[0] * zoom))
    return np.ascontiguousarray(cv2.resize(rgb, size, interpolation=how), np.uint8)


def ranks(values: F32) -> F64:
    """Rank of each value [N], from 0; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.asarray(np.cumsum(counts) - (counts + 1) / 2, np.float64)
    return np.asarray(middle[place], np.float64)


def block_sums(guess: F32, true: F32) -> F64:
    """Moments of the ranks by block of the image, [blocks, 6]: count, x, y, xx, yy, xy over known pixels."""
    known = np.isfinite(true) & np.isfinite(guess)
    x, y = ranks(guess[known]), ranks(true[known])
    x, y = x / max(1, len(x) - 1), y / max(1, len(y) - 1)
    row, column = np.nonzero(known)
    across = -(-true.shape[1] // BLOCK_PX)
    block = row // BLOCK_PX * across + column // BLOCK_PX
    columns = (np.ones_like(x), x, y, x * x, y * y, x * y)
    sums = np.stack([np.bincount(block, weights=values) for values in columns], axis=1)
    return np.asarray(sums[sums[:, 0] > 0], np.float64)


def rho_of(pictures: list[F64]) -> float:
    """Mean over pictures of the rank correlation from their blocks' moments."""
    found = []
    for sums in pictures:
        count, x, y, xx, yy, xy = sums.sum(axis=0)
        spread = (xx - x * x / count) * (yy - y * y / count)
        found.append((xy - x * y / count) / np.sqrt(spread) if spread > 0 else 0.0)
    return float(np.mean(found))


def interval(pictures: list[F64]) -> Row:
    """The mean rank correlation and where 95 % of it lie when blocks are drawn with replacement."""
    generator = np.random.Generator(np.random.Philox(key=[len(pictures), BLOCK_PX]))
    drawn = [
        rho_of([sums[generator.integers(len(sums), size=len(sums))] for sums in pictures])
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"rho": rho_of(pictures), "low": float(low), "high": float(high)}


CASES = {"transfer": transfer}
