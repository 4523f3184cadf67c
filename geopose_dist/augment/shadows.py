"""Cast shadows that grow with raised heights: an option of `raise_heights`, for tiles whose sun is known or guessed.

Heights moved to the ground are a map on which the sun can be followed before and after raising; what was lit
and no longer is gets darker by the ratio that the tile's own shadows have to its lit ground. No light is added.
The sun is (rows, columns) in pixels towards it per metre of climb; `estimate_sun` finds the one whose shadows fit the
tile's dark ground best. docs/decisions.md says how much nearer this comes to a scene rendered again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from geopose_dist import kernels
from geopose_dist.geometry import F32, flow_xy
from geopose_dist.kernels import render

U8 = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Sun = tuple[float, float]

GROUND_M = 1.0
"""Heights below this are ground: there shadows are looked for and their darkness is measured."""
LEAST_PX = 50
"""Fewer ground pixels in the sun or in the shade tell nothing."""
DARKEST = 0.2
"""Shadows are no darker than this share of lit ground."""
LIFT_M = 0.3
"""The sun is looked for from so far above a surface, so that its own roughness casts no shadow."""
COARSE_SIDE, FINE_SIDE = 160, 320
"""`estimate_sun` looks at a tile reduced to about so many pixels a side, first and last."""
TANGENTS = (0.35, 0.55, 0.8, 1.1, 1.5, 2.0)
"""Ground metres towards the sun per metre of climb that are tried: suns 27 to 71 degrees high."""

LONGER = (0.8, 0.86, 0.93, 1.0, 1.07, 1.15, 1.24)
"""Factors about the best of these that are tried last."""


def lengthen(
    before: tuple[U8, F32],
    raised: tuple[U8, F32],
    scale_px_per_m: float,
    angle_rad: float,
    factor: float,
    sun_px_per_m: Sun,
) -> U8:
    """The raised image with what newly lies in the shade darkened.

    Args:
        before: rgb uint8 [H, W, 3] and agl_m float32 [H, W] of the tile before raising.
        raised: the same two after `raise_heights`.
        scale_px_per_m: of both.
        angle_rad: of both.
        factor: by which heights were raised.
        sun_px_per_m: (rows, columns) towards the sun per metre of climb, finite.
    """
    if not all(math.isfinite(part) for part in sun_px_per_m):
        raise ValueError(f"sun_px_per_m is {sun_px_per_m}; wanted two finite numbers (rows, columns)")
    ground_rgb, map_m, known = _ground(*before, scale_px_per_m, angle_rad)
    lit_before = _lit(map_m, sun_px_per_m)
    ratio = _shade(ground_rgb, known & (map_m < GROUND_M), lit_before)
    if ratio is None:
        return raised[0]
    newly_dark = lit_before & ~_lit(map_m * np.float32(factor), sun_px_per_m)
    rgb, agl_m = raised
    dark = newly_dark[_ground_places(agl_m, scale_px_per_m, angle_rad)] & np.isfinite(agl_m)
    out = rgb.copy()
    out[dark] = np.rint(rgb[dark] * ratio).astype(np.uint8)
    return out


def estimate_sun(rgb: U8, agl_m: F32, scale_px_per_m: float, angle_rad: float, gsd_m: float) -> Sun | None:
    """The sun whose cast shadows fit the dark ground of a tile best; None where nothing tells.

    Args as for `raise_heights`; gsd_m: ground metres per pixel. Directions are tried in steps of 10 degrees, then of
    5 and 2.5 degrees about the best. Takes about a second.
    """
    ground = _ground(rgb, agl_m, scale_px_per_m, angle_rad)
    fit = _fit(ground, gsd_m, COARSE_SIDE)
    best = max(((float(d), t) for d in range(0, 360, 10) for t in TANGENTS[1::2]), key=fit)
    best = max(((best[0] + turn, t) for turn in (-5.0, 0.0, 5.0) for t in TANGENTS), key=fit)
    fit = _fit(ground, gsd_m, FINE_SIDE)
    best = max(
        ((best[0] + turn, best[1] * longer) for turn in (-2.5, 0.0, 2.5) for longer in LONGER), key=fit
    )
    return _sun(*best, gsd_m) if fit(best) > 0 else None


def _fit(ground: tuple[U8, F32, Mask], gsd_m: float, side: int) -> Callable[[tuple[float, float]], float]:
    """How well a sun (degrees, tangent) explains what ground is dark: a correlation, -1 where it cannot be told."""
    step = max(1, round(max(ground[1].shape) / side))
    rgb, map_m, known = ground[0][::step, ::step], ground[1][::step, ::step], ground[2][::step, ::step]
    looked_at = known & (map_m < GROUND_M)
    brightness = rgb.mean(axis=-1, dtype=np.float32)[looked_at]

    def fit(tried: tuple[float, float]) -> float:
        lit = _lit(map_m, _sun(*tried, gsd_m * step))[looked_at]
        if min(lit.sum(), (~lit).sum()) < LEAST_PX or brightness.std() == 0:
            return -1.0
        return float(np.corrcoef(lit, brightness)[0, 1])

    return fit


def _sun(degrees: float, tangent: float, gsd_m: float) -> Sun:
    px_per_m = tangent / gsd_m
    return math.cos(math.radians(degrees)) * px_per_m, math.sin(math.radians(degrees)) * px_per_m


def _ground(rgb: U8, agl_m: F32, scale_px_per_m: float, angle_rad: float) -> tuple[U8, F32, Mask]:
    """Colours and heights at their place on the ground, and where they are known; elsewhere the height is 0."""
    ground_rgb, map_m, _ = kernels.rectify(rgb, agl_m, scale_px_per_m, angle_rad)
    known = np.isfinite(map_m)
    return ground_rgb, np.where(known, np.maximum(map_m, 0), np.float32(0)), known


def _lit(map_m: F32, sun_px_per_m: Sun) -> Mask:
    """Where the sun is seen from the map of heights, bool [H, W]."""
    rows, cols = sun_px_per_m
    light = render.Light((cols, rows, 1.0), (1, 1, 1), (0, 0, 0))
    return render.shadow(render.Terrain(map_m), light, 1.0, LIFT_M).astype(np.bool_)


def _shade(ground_rgb: U8, looked_at: Mask, lit: Mask) -> npt.NDArray[np.float64] | None:
    """How dark the tile's shadows are beside its lit ground, by channel; None where one of the two is lacking."""
    sunny, dark = ground_rgb[looked_at & lit], ground_rgb[looked_at & ~lit]
    if min(len(sunny), len(dark)) < LEAST_PX:
        return None
    ratio: npt.NDArray[np.float64] = np.median(dark, axis=0) / np.maximum(np.median(sunny, axis=0), 1)
    return np.clip(ratio, DARKEST, 1)


def _ground_places(
    agl_m: F32, scale_px_per_m: float, angle_rad: float
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Row and column on the ground of every pixel, kept to the tile; of unknown ones their own."""
    right, down = flow_xy(np.nan_to_num(agl_m), scale_px_per_m, angle_rad)
    rows, cols = agl_m.shape
    row = np.rint(np.arange(rows)[:, None] + down).astype(np.intp)
    col = np.rint(np.arange(cols) + right).astype(np.intp)
    return row.clip(0, rows - 1), col.clip(0, cols - 1)
