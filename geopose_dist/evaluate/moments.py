"""The score as a sum over tiles: each tile becomes fourteen numbers, and a `Moments` is a bag of them.

Nothing but these rows crosses processes or ranks. Merging is putting bags together, and every figure is
computed by exactly rounded sums (`math.fsum`) and by merging centred moments, so the order, the number of
processes and the way of splitting change no bit. Per tile one pass over the pixels suffices because the
true flow is the true height times a constant vector. Formulas: DOMAIN of the challenge's public scorer,
R2 = 1 - SSE / (SST + 1e-4), the flow's components x and y pooled around one mean over both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from geopose_dist import geometry
from geopose_dist.geometry import F64
from geopose_dist.kernels import scoring

CITIES = ("ARG", "ATL", "JAX", "OMA")
"""The four cities of the benchmark."""
EPSILON = 1e-4
"""Added to SST by the public scorer."""
FIELDS = (
    "known",  # pixels with true height
    "mean_m",  # true height: mean and sum of squares around it
    "m2_m",
    "sse_agl",  # sum of squared and of absolute height errors, m
    "abs_agl",
    "posed",  # 1 if the tile has a true angle and scale, else 0
    "flow_mean",  # true flow, both components: mean, and sum of squares around it, px
    "flow_m2",
    "sse_flow",  # sum of squared and of plain endpoint errors, px
    "sum_epe",
    "sse_mag",  # sum of squared and of absolute magnitude errors, px
    "abs_mag",
    "angle_deg",  # error of the angle, degrees from 0 to 180
    "scale",  # absolute error of the scale, px/m
)


@dataclass(frozen=True)
class TileMoments:
    """What one tile adds to the score: its city, float64 [14] in the order of `FIELDS`, its name if it matters.

    `bins` are its errors by height, where somebody asked for them (see `bins.tile_bins`).
    """

    city: str
    values: F64
    key: str = ""
    bins: F64 | None = None

    def __getitem__(self, name: str) -> float:
        return float(self.values[FIELDS.index(name)])


def tile_moments(
    city: str,
    predicted: npt.NDArray[Any],
    pred_scale: float,
    pred_angle: float,
    true: npt.NDArray[Any],
    true_scale: float | None,
    true_angle: float | None,
    *,
    predicted_unit_m: float = 1.0,
    true_unit_m: float = 1.0,
) -> TileMoments:
    """Moments of one tile, one pass over its pixels.

    Args:
        city: name that groups tiles.
        predicted: heights [H, W], finite, in units of `predicted_unit_m` metres (0.01: centimetres).
        pred_scale: px/m, finite and > 0.
        pred_angle: radians, finite.
        true: heights [H, W]; unknown is NaN in floats and 65535 in uint16.
        true_scale: px/m; None or NaN without a pose label.
        true_angle: radians; None or NaN without a pose label.
        predicted_unit_m: metres of one unit of `predicted`.
        true_unit_m: metres of one unit of `true`.

    Raises:
        ValueError: sizes differ, or a prediction is not finite or its scale not positive.
    """
    if predicted.shape != true.shape:
        raise ValueError(
            f"predicted heights are {predicted.shape}, true heights {true.shape}; they must agree"
        )
    if not (math.isfinite(pred_scale) and pred_scale > 0 and math.isfinite(pred_angle)):
        raise ValueError(f"predicted scale {pred_scale} or angle {pred_angle} is not usable")
    posed = true_scale is not None and true_angle is not None
    posed = posed and math.isfinite(true_scale or 0.0) and math.isfinite(true_angle or 0.0)
    t_scale, t_angle = (float(true_scale or 0.0), float(true_angle or 0.0)) if posed else (0.0, 0.0)
    turn = math.sin((pred_angle - t_angle) / 2) ** 2
    # Squared distance of two vectors: (difference of lengths)^2 + 4 product of lengths sin^2(half the angle).
    offset = _near_mean(true, true_unit_m)
    sums = scoring.pixel_sums(
        predicted, true, predicted_unit_m, true_unit_m, pred_scale, t_scale, 4 * turn, offset
    )
    n, shifted, shifted2, cross, abs_d, sse_d, abs_g, sse_g, epe = sums
    if not math.isfinite(cross + sse_d):
        raise ValueError("predicted heights hold NaN or infinity; a prediction must be finite everywhere")
    mean = offset + shifted / n if n else 0.0
    m2 = max(shifted2 - shifted * shifted / n, 0.0) if n else 0.0
    x, y = geometry.direction(t_angle)
    half_sum = (x + y) / 2
    # Sum of s^2 t^2, less 2 n q^2 of the tile's own pooled mean q = s mean (x + y) / 2, without cancellation.
    flow_m2 = 2 * n * (t_scale * mean) ** 2 * max(0.5 - half_sum * half_sum, 0.0) + t_scale**2 * m2
    sse_flow = sse_g + 4 * turn * pred_scale * t_scale * cross
    values = [n, mean, m2, sse_d, abs_d]
    if posed:
        angle_error = float(geometry.angle_difference_deg(pred_angle, t_angle))
        values += [1.0, t_scale * mean * half_sum, flow_m2, sse_flow, epe, sse_g, abs_g]
        values += [angle_error, abs(pred_scale - t_scale)]
    else:
        values += [0.0] * 9
    return TileMoments(city, np.array(values, np.float64))


def _near_mean(true: npt.NDArray[Any], unit: float) -> float:
    """A height in metres near the mean of the first known ones; squares around it lose no digits."""
    for row in true:
        known = row[row != geometry.NO_DATA_CM] if row.dtype == np.uint16 else row[~np.isnan(row)]
        if known.size:
            return float(known.mean(dtype=np.float64)) * unit
    return 0.0


@dataclass
class Moments:
    """Moments of many tiles; see `tile_moments` for one.

    To gather them over ranks, send `to_array` (rows of different ranks may differ in number; pad with rows
    whose first number is -1) and put the parts together by `from_array`.

    Attributes:
        tiles: in any order.
    """

    tiles: list[TileMoments] = field(default_factory=list)

    @staticmethod
    def of_tile(
        city: str,
        pred_agl_m: npt.NDArray[Any],
        pred_scale: float,
        pred_angle: float,
        true_agl_m: npt.NDArray[Any],
        true_scale: float | None,
        true_angle: float | None,
    ) -> TileMoments:
        """`tile_moments` of heights in metres [H, W]; scales in px/m, angles in radians."""
        return tile_moments(city, pred_agl_m, pred_scale, pred_angle, true_agl_m, true_scale, true_angle)

    def add(self, tile: TileMoments) -> None:
        """Count one more tile."""
        self.tiles.append(tile)

    def merged(self, *others: Moments) -> Moments:
        """These tiles and those of `others` together."""
        return Moments([*self.tiles, *(tile for other in others for tile in other.tiles)])

    def to_array(self, cities: Sequence[str]) -> F64:
        """float64 [tiles, 15]: position of the city in `cities`, then `FIELDS`."""
        numbers = {city: float(i) for i, city in enumerate(cities)}
        rows = [np.concatenate(([numbers[tile.city]], tile.values)) for tile in self.tiles]
        return np.array(rows, np.float64).reshape(-1, 1 + len(FIELDS))

    @classmethod
    def from_array(cls, array: F64, cities: Sequence[str]) -> Moments:
        """The inverse of `to_array`; rows whose first number is negative are padding."""
        rows = np.asarray(array, np.float64).reshape(-1, 1 + len(FIELDS))
        return cls([TileMoments(cities[int(row[0])], row[1:].copy()) for row in rows if row[0] >= 0])

    def scores(self) -> dict[str, Any]:
        """The score in the form of `geopose evaluate --json`.

        A city counts if any of its tiles has a known height. `vflow_r2` is None and `r2` is `agl_r2` where no
        tile of a city has a pose label (only in training on such data; `evaluate` refuses it). `r2` of all is
        the plain mean over the cities present, NaN if there is none; the benchmark's cities that are not
        present are named in `cities_missing`.
        """
        by_city: dict[str, list[TileMoments]] = {}
        for tile in self.tiles:
            by_city.setdefault(tile.city, []).append(tile)
        cities = {
            city: _city_scores(tiles)
            for city, tiles in sorted(by_city.items())
            if any(tile["known"] > 0 for tile in tiles)
        }
        r2 = math.fsum(facts["r2"] for facts in cities.values()) / len(cities) if cities else math.nan
        return {"cities": cities, "r2": r2, "cities_missing": [city for city in CITIES if city not in cities]}


def _city_scores(tiles: Sequence[TileMoments]) -> dict[str, Any]:
    measured = [tile for tile in tiles if tile["known"] > 0]
    posed = [tile for tile in tiles if tile["posed"] > 0]
    both = [tile for tile in measured if tile["posed"] > 0]
    sst_agl = _spread((tile["known"], tile["mean_m"], tile["m2_m"]) for tile in measured)
    sst_flow = _spread((2 * tile["known"], tile["flow_mean"], tile["flow_m2"]) for tile in both)
    agl_r2 = 1 - math.fsum(tile["sse_agl"] for tile in measured) / (sst_agl + EPSILON)
    vflow_r2 = 1 - math.fsum(tile["sse_flow"] for tile in both) / (sst_flow + EPSILON) if both else None

    def per_pixel(name: str, among: Sequence[TileMoments]) -> list[float]:
        return [tile[name] / tile["known"] for tile in among]

    angles = [tile["angle_deg"] for tile in posed]
    scales = [tile["scale"] for tile in posed]
    return {
        "agl_r2": agl_r2,
        "vflow_r2": vflow_r2,
        "r2": agl_r2 if vflow_r2 is None else (agl_r2 + vflow_r2) / 2,
        "mean_angle_error_deg": _mean(angles),
        "rms_angle_error_deg": _root_mean(e * e for e in angles),
        "mean_scale_error": _mean(scales),
        "rms_scale_error": _root_mean(e * e for e in scales),
        "mean_mag_error": _mean(per_pixel("abs_mag", both)),
        "rms_mag_error": _root_mean(per_pixel("sse_mag", both)),
        "mean_epe": _mean(per_pixel("sum_epe", both)),
        "rms_epe": _root_mean(per_pixel("sse_flow", both)),
        "mean_agl_error": _mean(per_pixel("abs_agl", measured)),
        "rms_agl_error": _root_mean(per_pixel("sse_agl", measured)),
        "images": len(tiles),
    }


def _spread(parts: Iterable[tuple[float, float, float]]) -> float:
    """Sum of squares around the common mean of groups given as (count, mean, sum of squares around it)."""
    groups = list(parts)
    count = math.fsum(n for n, _, _ in groups)
    if count == 0:
        return 0.0
    mean = math.fsum(n * m for n, m, _ in groups) / count
    return math.fsum([*(s for _, _, s in groups), *(n * (m - mean) ** 2 for n, m, _ in groups)])


def _mean(numbers: Iterable[float]) -> float | None:
    listed = list(numbers)
    return math.fsum(listed) / len(listed) if listed else None


def _root_mean(numbers: Iterable[float]) -> float | None:
    mean = _mean(numbers)
    return None if mean is None else math.sqrt(mean)
