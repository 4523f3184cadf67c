"""What packing counts: exact sums of heights and scales by city, and the manifest's statistics from them.

Sums of heights are whole centimetres, so they are the same in whatever order and by however many workers
they are added up.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from geopose_dist.geometry import CM_PER_M, NO_DATA_CM


@dataclass(frozen=True)
class Tally:
    """Sums over tiles of one city.

    Attributes:
        tiles: how many.
        pixels: of tiles with heights, known or not.
        known: pixels with known height.
        sum_cm: sum of known heights.
        sum_cm2: sum of their squares.
        scales: tiles with a scale.
        sum_scale: sum of these, px/m of the stored pixels.
    """

    tiles: int = 0
    pixels: int = 0
    known: int = 0
    sum_cm: int = 0
    sum_cm2: int = 0
    scales: int = 0
    sum_scale: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            *(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        )


def of_tile(agl_cm: npt.NDArray[np.uint16] | None, scale_px_per_m: float | None) -> Tally:
    """The tally of one tile: heights uint16 centimetres [H, W] and scale, as far as known."""
    scales, sum_scale = (0, 0.0) if scale_px_per_m is None else (1, scale_px_per_m)
    if agl_cm is None:
        return Tally(tiles=1, scales=scales, sum_scale=sum_scale)
    known = agl_cm[agl_cm != NO_DATA_CM].astype(np.uint64)
    return Tally(
        1, int(agl_cm.size), int(known.size), int(known.sum()), int((known * known).sum()), scales, sum_scale
    )


def statistics(tallies: Iterable[tuple[str, str, Tally]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The manifest's statistics of (split, city, tally), by split, then city; None where nothing is known."""
    sums: dict[str, dict[str, Tally]] = {}
    for split, city, tally in tallies:
        cities = sums.setdefault(split, {})
        cities[city] = cities.get(city, Tally()) + tally
    return {
        split: {city: _summary(t) for city, t in sorted(cities.items())} for split, cities in sums.items()
    }


def _summary(tally: Tally) -> dict[str, Any]:
    known = tally.known
    mean_cm = tally.sum_cm / known if known else 0.0
    # Exact integers first: the difference of two large floats would lose the spread of flat cities.
    variance_cm2 = (tally.sum_cm2 * known - tally.sum_cm**2) / known**2 if known else 0.0
    return {
        "tiles": tally.tiles,
        "agl_mean_m": mean_cm / CM_PER_M if known else None,
        "agl_std_m": math.sqrt(variance_cm2) / CM_PER_M if known else None,
        "unknown_share": 1 - known / tally.pixels if tally.pixels else None,
        "scale_mean_px_per_m": tally.sum_scale / tally.scales if tally.scales else None,
    }
