"""Errors by true height: where a model that is good on lawns is lost on towers.

A tile's row holds, for each bin of true heights, how many pixels it has and the sums of their errors; rows
add up. Bins are in metres and closed below: a pixel of 3.00 m belongs to `3 to 6`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from geopose_dist import geometry
from geopose_dist.geometry import F64

EDGES_M = (0.0, 1.0, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0)
"""Lower edges; what is below the first belongs to it, the last is open."""


def names() -> list[str]:
    """Name of each bin, in metres."""
    return [
        *(f"{low:g} to {high:g}" for low, high in itertools.pairwise(EDGES_M)),
        f"{EDGES_M[-1]:g} and more",
    ]


def tile_bins(
    predicted: npt.NDArray[Any], true: npt.NDArray[Any], predicted_unit_m: float, true_unit_m: float
) -> F64:
    """float64 [bins, 4] of one tile: pixels, sum of errors, of absolute and of squared errors, in metres.

    Heights [H, W] in their units; unknown true ones (65535 in uint16, NaN in floats) are left out.
    """
    known = true != geometry.NO_DATA_CM if true.dtype == np.uint16 else ~np.isnan(true)
    true_m = true[known].astype(np.float64) * true_unit_m
    error = predicted[known].astype(np.float64) * predicted_unit_m - true_m
    # Centimetres times 0.01 may fall short of an edge by a rounding.
    number = np.searchsorted(np.array(EDGES_M[1:]) - 1e-9, true_m, side="right")
    columns = [
        np.bincount(number, weights, len(EDGES_M)) for weights in (None, error, np.abs(error), error**2)
    ]
    return np.stack(columns, axis=1).astype(np.float64)


def summary(rows: Sequence[F64]) -> list[dict[str, Any]]:
    """One row per bin over tiles: pixels, share of all, mean error (bias), mean absolute error and RMS in metres."""
    total = np.array([[math.fsum(row[b, k] for row in rows) for k in range(4)] for b in range(len(EDGES_M))])
    pixels = total[:, 0].sum()
    return [
        {
            "height_m": name,
            "pixels": int(count),
            "share": float(count / pixels) if pixels else 0.0,
            "bias_m": float(error / count) if count else None,
            "mean_error_m": float(absolute / count) if count else None,
            "rms_error_m": float(math.sqrt(square / count)) if count else None,
        }
        for name, (count, error, absolute, square) in zip(names(), total, strict=True)
    ]
