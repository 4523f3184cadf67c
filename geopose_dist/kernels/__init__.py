"""Checked Python doors of the compiled kernels; nothing outside this package calls the `_*.pyx` directly.

`rectify` moves a tile to its ground position; `invert_flow` says where each surface comes to lie when it
moves against the flow; `gather` resamples a tile once through any composition of affine map and raised
heights. All are pure, work on any size, keep (row, column) order, release the GIL, and have slow NumPy twins
in `reference.py` that say what they compute. Wrong arguments are ValueErrors: name, found, wanted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

import geopose_dist.kernels._gather as _gather
import geopose_dist.kernels._sight as _sight
import geopose_dist.kernels._splat as _splat
from geopose_dist.geometry import F32, direction

U8 = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
T = TypeVar("T", bound=np.generic)

BLOCK = 16
"""Side of the blocks whose tallest surface tells lines of sight what to skip."""
MAX_SIDE = 32767
"""Pixels per side at most: the splat numbers pixels in 31 bits."""
MAX_SHIFT_PX = 4.0 * MAX_SIDE
"""Surfaces are moved by at most this: more leaves every tile, and float32 could not solve for a crossing."""

_NO_AGL = np.zeros((1, 1), np.float32)


def _check_rgb(rgb: U8, name: str = "rgb") -> U8:
    if not isinstance(rgb, np.ndarray) or rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"{name} is {_said(rgb)}; wanted uint8 [H, W, 3]")
    _check_sides(rgb, name)
    return np.ascontiguousarray(rgb)


def _check_plane(plane: F32, name: str, like: U8 | None = None) -> F32:
    if not isinstance(plane, np.ndarray) or plane.dtype != np.float32 or plane.ndim != 2:
        raise ValueError(f"{name} is {_said(plane)}; wanted float32 [H, W]")
    if like is not None and plane.shape != like.shape[:2]:
        raise ValueError(f"{name} is {_said(plane)}; wanted the size of rgb, {like.shape[:2]}")
    _check_sides(plane, name)
    return np.ascontiguousarray(plane)


def _check_sides(array: npt.NDArray[np.generic], name: str) -> None:
    if not all(1 <= side <= MAX_SIDE for side in array.shape[:2]):
        raise ValueError(f"{name} has size {array.shape[:2]}; wanted sides of 1 to {MAX_SIDE}")


def _said(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"


def _check_number(value: float, name: str, wanted: str, low: float, low_allowed: bool = False) -> float:
    number = float(value)
    if not math.isfinite(number) or number < low or (number == low and not low_allowed):
        raise ValueError(f"{name} is {value}; wanted {wanted}")
    return number


def _check_pose(scale_px_per_m: float, angle_rad: float) -> tuple[float, float, float]:
    """(scale, dir_y, dir_x)."""
    scale = _check_number(scale_px_per_m, "scale_px_per_m", "a finite number above 0", 0.0)
    angle = _check_number(angle_rad, "angle_rad", "a finite number of radians", -math.inf)
    x, y = direction(angle)
    return scale, y, x


def _check_part(
    array: npt.NDArray[np.generic], name: str, origin: tuple[int, int], tile_size: tuple[int, int] | None
) -> npt.NDArray[np.intp]:
    """[first row, first column, rows, columns of the tile], or ValueError if `array` cannot lie there."""
    ends = [int(first) + side for first, side in zip(origin, array.shape[:2], strict=True)]
    whole = ends if tile_size is None else [int(side) for side in tile_size]
    if min(origin) < 0 or any(end > side for end, side in zip(ends, whole, strict=True)):
        raise ValueError(
            f"origin is {tuple(origin)} with {name} of {array.shape[:2]}; wanted a part of the tile of {tuple(whole)}"
        )
    if max(whole) > MAX_SIDE:
        raise ValueError(f"tile_size is {tuple(whole)}; wanted sides of at most {MAX_SIDE}")
    return np.array([*origin, *whole], np.intp)


def check_tile(rgb: U8, agl_m: F32, scale_px_per_m: float, angle_rad: float) -> None:
    """ValueError unless these are a tile and its pose: uint8 [H, W, 3], float32 [H, W], usable numbers."""
    _check_plane(agl_m, "agl_m", _check_rgb(rgb))
    _check_pose(scale_px_per_m, angle_rad)


def rectify(rgb: U8, agl_m: F32, scale_px_per_m: float, angle_rad: float) -> tuple[U8, F32, Mask]:
    """Move every pixel of an oblique tile to its position on the ground.

    Args:
        rgb: uint8 [H, W, 3].
        agl_m: float32 [H, W] metres; NaN = unknown: stays where it is and loses to everything known.
        scale_px_per_m: flow pixels per metre.
        angle_rad: flow direction (geometry.flow_xy).

    Returns:
        (rgb uint8 [H, W, 3], agl_m float32 [H, W], occluded bool [H, W]): where several surfaces land on one
        ground pixel the tallest stays, of equals the first in raster order. Occluded pixels (no surface
        landed) have colour 0 and height NaN; one-pixel cracks of stretched slopes are closed.
    """
    rgb = _check_rgb(rgb)
    agl_m = _check_plane(agl_m, "agl_m", rgb)
    scale, dir_y, dir_x = _check_pose(scale_px_per_m, angle_rad)
    winner = np.empty(agl_m.shape, np.int32)
    _splat.splat(agl_m, scale, dir_y, dir_x, winner)
    out_rgb, out_agl, occluded = np.empty_like(rgb), np.empty_like(agl_m), np.empty(agl_m.shape, np.uint8)
    _splat.settle(rgb, agl_m, winner, out_rgb, out_agl, occluded)
    return out_rgb, out_agl, occluded.view(np.bool_)


def invert_flow(
    agl_m: F32,
    px_per_m: float,
    angle_rad: float,
    *,
    facade_px_per_px: float | None = None,
    origin: tuple[int, int] = (0, 0),
) -> F32:
    """Shift of the surface seen at each pixel after every surface moved AGAINST the flow.

    A surface of height h at position p appears at p - h * px_per_m * (sin angle, cos angle). For each output
    pixel this finds the first surface that its line of sight meets, so the surface came from
    p + shift * (sin angle, cos angle). To raise heights by f, px_per_m is scale * (f - 1).

    Args:
        agl_m: float32 [H, W] metres; below 0 counts as 0; unknown (NaN) is filled along the line of sight.
        px_per_m: pixels of movement per metre, >= 0.
        angle_rad: flow direction.
        facade_px_per_px: how fast the shift falls along a facade hidden in an unknown stretch (f - 1 when
            raising by f); None: at once, a roof ends where the unknown begins.
        origin: row and column of the tile that agl_m begins with, if it is a part of a tile: its pixels look
            along the same lines, so shifts are those of the whole tile wherever the part holds all that is met.

    Returns:
        float32 [H, W] pixels >= 0; NaN where the line of sight leaves the tile.
    """
    agl_m = _check_plane(agl_m, "agl_m")
    per_m = _check_number(px_per_m, "px_per_m", "a finite number >= 0", 0.0, low_allowed=True)
    _, dir_y, dir_x = _check_pose(1.0, angle_rad)
    first = _check_part(agl_m, "agl_m", origin, None)
    drop = (
        1e30
        if facade_px_per_px is None
        else _check_number(facade_px_per_px, "facade_px_per_px", ">= 0", 0.0, True)
    )
    shift = np.empty_like(agl_m)
    blocks = np.empty([-(-side // BLOCK) for side in agl_m.shape], np.float32)
    column = np.zeros(agl_m.shape[1], np.float32)
    if _sight.shifts(agl_m, shift, blocks, column, per_m):
        step = 1 / max(abs(dir_y), abs(dir_x))
        before = np.empty((2, *agl_m.shape), np.float32)
        _sight.fill_unknown(agl_m, shift, before, dir_y, dir_x, drop * step, first[0], first[1])
        _sight.block_tallest(shift, blocks, column)
    tallest = float(blocks.max())
    if tallest == 0:
        return shift
    if tallest > MAX_SHIFT_PX:
        np.minimum(shift, np.float32(MAX_SHIFT_PX), out=shift)
        _sight.block_tallest(shift, blocks, column)
    out = np.empty_like(agl_m)
    # Nothing can be met from farther than the tile's sides; this keeps the tables of steps small.
    _sight.follow(shift, blocks, out, dir_y, dir_x, min(tallest, 2.0 * max(agl_m.shape)))
    return out


@dataclass(frozen=True)
class Raised:
    """What `gather` needs to know of raised heights.

    Attributes:
        shift_px: `invert_flow` of the tile with px_per_m = scale * (factor - 1).
        angle_rad: flow direction.
        agl_per_shift: new height in metres per pixel of shift: factor / px_per_m.
    """

    shift_px: F32
    angle_rad: float
    agl_per_shift: float


def gather(
    rgb: U8,
    agl_m: F32 | None,
    matrix: npt.NDArray[np.float64],
    size: tuple[int, int],
    raised: Raised | None = None,
    fill: tuple[int, int, int] = (0, 0, 0),
    *,
    origin: tuple[int, int] = (0, 0),
    tile_size: tuple[int, int] | None = None,
) -> tuple[U8, F32 | None, Mask | None]:
    """Resample a tile once.

    Args:
        rgb: uint8 [H, W, 3], read bilinearly.
        agl_m: float32 [H, W] or None, read at the nearest pixel.
        matrix: float64 [2, 3]: output (row, column, 1) to the place (row, column) in the (raised) tile.
        size: rows and columns of the output.
        raised: heights to raise on the way.
        fill: colour outside the tile.
        origin: row and column of the tile that rgb begins with, if it is a part of a tile.
        tile_size: rows and columns of that tile; None = rgb is all of it. Places stay those of the tile, and a
            part that holds every pixel that is read gives the bytes of the whole. What it lacks reads as its
            nearest pixel: it is for the caller to cut wide enough.

    Returns:
        (rgb uint8 [rows, cols, 3], agl_m float32 [rows, cols] or None with NaN outside, inside bool
        [rows, cols] or None where every pixel is inside).
    """
    rgb = _check_rgb(rgb)
    agl = _NO_AGL if agl_m is None else _check_plane(agl_m, "agl_m", rgb)
    m = np.ascontiguousarray(matrix, np.float64)
    if m.shape != (2, 3) or not np.isfinite(m).all():
        raise ValueError(f"matrix is {_said(m)}, {m.tolist()}; wanted finite float64 [2, 3]")
    rows, cols = (int(side) for side in size)
    if not (1 <= rows <= MAX_SIDE and 1 <= cols <= MAX_SIDE):
        raise ValueError(f"size is {size}; wanted sides of 1 to {MAX_SIDE}")
    part = _check_part(rgb, "rgb", origin, tile_size)
    if raised is None:
        turned = _turn(
            rgb, None if agl_m is None else agl, m - [[0, 0, part[0]], [0, 0, part[1]]], (rows, cols)
        )
        if turned is not None:
            return *turned, None
    shift, dir_y, dir_x, per_shift = _NO_AGL, 0.0, 0.0, 0.0
    if raised is not None:
        shift = _check_plane(raised.shift_px, "raised.shift_px", rgb)
        _, dir_y, dir_x = _check_pose(1.0, raised.angle_rad)
        per_shift = _check_number(raised.agl_per_shift, "raised.agl_per_shift", "a finite number > 0", 0.0)
    out_rgb = np.empty((rows, cols, 3), np.uint8)
    out_agl = np.empty((rows, cols) if agl_m is not None else (1, 1), np.float32)
    inside = np.empty((rows, cols), np.uint8)
    outside = _gather.gather(
        _at_least_2(rgb), _at_least_2(agl), agl_m is not None, _at_least_2(shift), raised is not None, dir_y, dir_x,
        per_shift, m.reshape(6), rgb.shape[0], rgb.shape[1], part, np.array(fill, np.uint8),
        out_rgb, out_agl, inside,
    )  # fmt: skip
    return out_rgb, out_agl if agl_m is not None else None, inside.view(np.bool_) if outside else None


def _turn(
    rgb: U8, agl_m: F32 | None, m: npt.NDArray[np.float64], size: tuple[int, int]
) -> tuple[U8, F32 | None] | None:
    """`gather` where nothing needs to be interpolated or filled: a copy with axes turned; else None."""
    linear = m[:, :2]
    if not (np.array_equal(np.abs(linear), np.eye(2)) or np.array_equal(np.abs(linear), np.eye(2)[::-1])):
        return None
    corners = m @ np.array([[0, size[0] - 1], [0, size[1] - 1], [1, 1]])
    low, high = corners.min(axis=1), corners.max(axis=1)
    if (m[:, 2] % 1 != 0).any() or (low < 0).any() or (high >= rgb.shape[:2]).any():
        return None
    cols = rgb.shape[1]
    step = [cols, 1] @ m
    out_rgb = np.empty((*size, 3), np.uint8)
    out_agl = np.empty(size if agl_m is not None else (1, 1), np.float32)
    _gather.turn(
        rgb, _NO_AGL if agl_m is None else agl_m, agl_m is not None,
        int(step[2]), int(step[0]), int(step[1]), out_rgb, out_agl,
    )  # fmt: skip
    return out_rgb, out_agl if agl_m is not None else None


def _at_least_2(array: npt.NDArray[T]) -> npt.NDArray[T]:
    """The array with a single row or column repeated: bilinear reading has two of each."""
    rows, cols = np.maximum(2 // np.array(array.shape[:2]), 1)
    return array if rows == cols == 1 else array.repeat(rows, 0).repeat(cols, 1)


def tone(rgb: U8, table: U8, noise: npt.NDArray[np.int8] | None = None, random: U8 | None = None) -> U8:
    """Change colours by a table, then add noise looked up by random bytes.

    Args:
        rgb: uint8 [H, W, 3]; not changed.
        table: uint8 [3, 256], by channel.
        noise: int8 [256], what each random byte adds; None for no noise.
        random: uint8 [H * W * 3], needed with noise.
    """
    out = _check_rgb(rgb).copy()
    if table.dtype != np.uint8 or table.shape != (3, 256):
        raise ValueError(f"table is {_said(table)}; wanted uint8 [3, 256]")
    if noise is None or random is None:
        empty = np.zeros(1, np.uint8)
        _gather.tone(out, np.ascontiguousarray(table), empty.view(np.int8), empty, False)
        return out
    if noise.dtype != np.int8 or noise.shape != (256,):
        raise ValueError(f"noise is {_said(noise)}; wanted int8 [256]")
    if random.dtype != np.uint8 or random.shape != (out.size,):
        raise ValueError(f"random is {_said(random)}; wanted uint8 [{out.size}]")
    _gather.tone(out, np.ascontiguousarray(table), noise, np.ascontiguousarray(random), True)
    return out
