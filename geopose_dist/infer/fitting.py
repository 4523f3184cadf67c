"""Fitting and scoring height calibrations from sums: factors by city, a monotone curve, and honest numbers.

A tile's predicted and true heights are reduced to sums by predicted height (bins of 0.1 m), from which any
correction can be fitted and its R2 of heights and flow told without the pixels. Tiles of one place stay in one fold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from geopose_dist.errors import UserError
from geopose_dist.geometry import F32, F64
from geopose_dist.infer import calibration
from geopose_dist.infer.calibration import EVERY_CITY

BIN_M = 0.1
BINS = 2501
"""Predicted heights up to 250 m; the last bin holds all that is taller."""
LEAST_PIXELS = 500
"""Bins of the curve are joined until each holds so many pixels."""
MOST_POINTS = 64
TINY = 1e-4
"""As the challenge adds to a variance."""


@dataclass(frozen=True)
class TileSums:
    """A tile by predicted height.

    Attributes:
        city, place: of the tile; the key where the place is unknown.
        pixels, true_m: known pixels and the sum of their true heights, by bin of predicted height.
        square_m2: sum of squares of true heights.
        scale, true_scale: px/m, None where the truth has none.
        direction, true_direction: unit vectors (x, y).
    """

    city: str
    place: str
    pixels: F64
    true_m: F64
    square_m2: float
    scale: float | None = None
    true_scale: float | None = None
    direction: tuple[float, float] = (0.0, 0.0)
    true_direction: tuple[float, float] = (0.0, 0.0)


Correction = Callable[[F64, str], F64]
"""Predicted heights of the bins and a city to corrected heights."""


def heights_of_bins() -> F64:
    """The predicted height in metres that each bin stands for."""
    return np.arange(BINS, dtype=np.float64) * np.float64(BIN_M)


def tile_sums(agl_m: F32, true_m: F32, city: str, place: str, **pose: Any) -> TileSums:
    """Sums of one tile; pixels whose truth is unknown (NaN) are left out."""
    known = np.isfinite(true_m)
    number = np.rint(agl_m[known] / BIN_M).astype(np.int64).clip(0, BINS - 1)
    true = true_m[known].astype(np.float64)
    pixels = np.bincount(number, minlength=BINS).astype(np.float64)
    sums = np.bincount(number, true, BINS).astype(np.float64)
    return TileSums(city, place, pixels, sums, float((true**2).sum()), **pose)


def fit_factors(tiles: Sequence[TileSums]) -> dict[str, float]:
    """The factor per city with the least squared error, and the one for cities that are not among them."""
    heights = heights_of_bins()

    def factor(chosen: Sequence[TileSums]) -> float:
        square = sum(float(tile.pixels @ heights**2) for tile in chosen)
        product = sum(float(tile.true_m @ heights) for tile in chosen)
        return product / square if square > 0 and product > 0 else 1.0

    cities = sorted({tile.city for tile in tiles})
    factors = {city: factor([tile for tile in tiles if tile.city == city]) for city in cities}
    return {**factors, EVERY_CITY: factor(tiles)}


def fit_curve(tiles: Sequence[TileSums]) -> tuple[list[float], list[float]]:
    """Points (predicted, true) of the monotone curve with the least squared error, every city weighing alike."""
    pixels, true = np.zeros(BINS), np.zeros(BINS)
    for city in {tile.city for tile in tiles}:
        chosen = [tile for tile in tiles if tile.city == city]
        spread = _spread(chosen)[0] + TINY
        for tile in chosen:
            pixels += tile.pixels / spread  # the score divides errors by it
            true += tile.true_m / spread
    count = np.sum([tile.pixels for tile in tiles], axis=0)
    heights, at, weights, values = heights_of_bins(), [], [], []
    first = 0
    total = float(np.sum(count))
    least = max(LEAST_PIXELS, total / (20 * MOST_POINTS))
    while first < BINS:
        last = first + 1
        while last < BINS and (count[first:last].sum() < least or last - first < first // 20):
            last += 1
        weight = float(pixels[first:last].sum())
        if weight > 0:
            at.append(float(pixels[first:last] @ heights[first:last]) / weight)
            values.append(float(true[first:last].sum()) / weight)
            weights.append(weight)
        first = last
    grown = calibration.pooled(np.array(values), np.array(weights))
    return [round(x, 4) for x in at], [round(float(max(y, 0)), 4) for y in grown]


def _spread(tiles: Sequence[TileSums]) -> tuple[float, float]:
    """Total squares of true heights and true flow about their means."""
    pixels = sum(float(tile.pixels.sum()) for tile in tiles)
    mean = sum(float(tile.true_m.sum()) for tile in tiles) / max(pixels, 1)
    heights = sum(tile.square_m2 for tile in tiles) - pixels * mean**2
    posed = [tile for tile in tiles if tile.true_scale is not None]
    squares = sum(tile.square_m2 * (tile.true_scale or 0) ** 2 for tile in posed)
    total = sum(
        float(tile.true_m.sum()) * (tile.true_scale or 0) * sum(tile.true_direction) for tile in posed
    )
    count = 2 * sum(float(tile.pixels.sum()) for tile in posed)
    return heights, squares - total**2 / max(count, 1)


def errors(tile: TileSums, correct: Correction) -> tuple[float, float]:
    """Sums of squared errors of heights and flow under a correction."""
    heights = correct(heights_of_bins(), tile.city)
    square, product = float(tile.pixels @ heights**2), float(tile.true_m @ heights)
    agl = square - 2 * product + tile.square_m2
    if tile.true_scale is None or tile.scale is None:
        return agl, 0.0
    agree = sum(a * b for a, b in zip(tile.direction, tile.true_direction, strict=True))
    flow = tile.scale**2 * square - 2 * tile.scale * tile.true_scale * agree * product
    return agl, flow + tile.true_scale**2 * tile.square_m2


def scores(tiles: Sequence[TileSums], corrections: Sequence[Correction]) -> dict[str, float]:
    """R2 of heights and of flow, and their mean, as means over cities; one correction per tile."""
    agl, flow = [], []
    for city in sorted({tile.city for tile in tiles}):
        chosen = [(t, c) for t, c in zip(tiles, corrections, strict=True) if t.city == city]
        spread = _spread([tile for tile, _ in chosen])
        found = [errors(tile, correct) for tile, correct in chosen]
        agl.append(1 - sum(e[0] for e in found) / (spread[0] + TINY))
        flow.append(1 - sum(e[1] for e in found) / (spread[1] + TINY))
    heights, flows = float(np.mean(agl)), float(np.mean(flow))
    return {"agl_r2": heights, "vflow_r2": flows, "r2": (heights + flows) / 2}


def corrections_of(tiles: Sequence[TileSums]) -> dict[str, Correction]:
    """What these tiles say about heights, by method."""
    factors, (at, to) = fit_factors(tiles), fit_curve(tiles)
    return {
        "none": lambda heights, city: heights,
        "factor": lambda heights, city: heights * factors.get(city, factors[EVERY_CITY]),
        "curve": lambda heights, city: calibration.curve(heights.astype(np.float32), at, to).astype(
            np.float64
        ),
    }


def out_of_fold(tiles: Sequence[TileSums], folds: int) -> dict[str, dict[str, float]]:
    """Scores by method, every tile corrected by what the other folds say; a place lies in one fold."""
    places = sorted({tile.place for tile in tiles})
    folds = min(folds, len(places))
    if folds < 2:
        raise UserError(
            f"the split has tiles of {len(places)} place; wanted 2 or more to tell whether it helps"
        )
    fold_of = {place: i % folds for i, place in enumerate(places)}
    fitted = [
        corrections_of([tile for tile in tiles if fold_of[tile.place] != fold]) for fold in range(folds)
    ]
    return {
        method: scores(tiles, [fitted[fold_of[tile.place]][method] for tile in tiles])
        for method in ("none", "factor", "curve")
    }
