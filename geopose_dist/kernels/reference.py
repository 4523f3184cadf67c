"""Slow NumPy twins of the kernels: what each computes, in the plainest form that is still exact.

Tests hold every kernel against its twin. A twin takes the same arguments as its door and checks none of them;
it loops over pixels or steps and is thousands of times slower. Where a kernel counts in float32, so does its twin.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from geopose_dist.geometry import F32, direction
from geopose_dist.kernels import MAX_SHIFT_PX, U8, Mask, Raised


def _half_up(value: float) -> int:
    return math.floor(value + 0.5)


def _inside(row: int, col: int, shape: tuple[int, ...]) -> bool:
    return 0 <= row < shape[0] and 0 <= col < shape[1]


def rectify(rgb: U8, agl_m: F32, scale_px_per_m: float, angle_rad: float) -> tuple[U8, F32, Mask]:
    """Twin of `kernels.rectify`: sort what lands on each ground pixel, keep the tallest."""
    dir_x, dir_y = direction(angle_rad)
    winner: dict[tuple[int, int], tuple[float, int, int]] = {}
    for row, col in np.ndindex(agl_m.shape):
        height = float(agl_m[row, col])
        known = math.isfinite(height)
        to = (row, col)
        if known:
            to = (
                row + _half_up(height * (scale_px_per_m * dir_y)),
                col + _half_up(height * (scale_px_per_m * dir_x)),
            )
        rank = height if known else -math.inf
        if _inside(*to, agl_m.shape) and (to not in winner or rank > winner[to][0]):
            winner[to] = (rank, row, col)
    out_rgb, out_agl, occluded = (
        np.zeros_like(rgb),
        np.full_like(agl_m, np.nan),
        np.zeros(agl_m.shape, np.bool_),
    )
    for row, col in np.ndindex(agl_m.shape):
        found = winner.get((row, col))
        if found is None and 0 < row < agl_m.shape[0] - 1 and 0 < col < agl_m.shape[1] - 1:
            for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
                before, behind = winner.get((row - down, col - right)), winner.get((row + down, col + right))
                if before is not None and behind is not None:
                    unknown = math.inf in (-before[0], -behind[0])
                    found = behind if not unknown and behind[0] < before[0] else before
                    break
        if found is None:
            occluded[row, col] = True
            continue
        out_rgb[row, col] = rgb[found[1], found[2]]
        out_agl[row, col] = found[0] if math.isfinite(found[0]) else np.nan
    return out_rgb, out_agl, occluded


def invert_flow(
    agl_m: F32,
    px_per_m: float,
    angle_rad: float,
    *,
    facade_px_per_px: float | None = None,
    origin: tuple[int, int] = (0, 0),
) -> F32:
    """Twin of `kernels.invert_flow`: walk every pixel's line of sight from far to near until it meets a surface."""
    dir_x, dir_y = direction(angle_rad)
    length = 1 / max(abs(dir_x), abs(dir_y))
    with np.errstate(invalid="ignore", over="ignore"):
        shift = np.maximum(agl_m * np.float32(px_per_m), np.float32(0))
    drop = 1e30 if facade_px_per_px is None else facade_px_per_px * length
    shift = _filled(shift, np.isfinite(agl_m), dir_y, dir_x, np.float32(drop), origin)
    shift = np.minimum(shift, np.float32(MAX_SHIFT_PX))
    out = np.full_like(shift, np.nan)
    reach = min(int(float(shift.max()) / length), 2 * max(shift.shape)) + 2
    steps = [(_half_up(k * length * dir_y), _half_up(k * length * dir_x)) for k in range(reach + 2)]
    for row, col in np.ndindex(shift.shape):
        for k in range(reach, -1, -1):
            here = (row + steps[k][0], col + steps[k][1])
            if not _inside(*here, shift.shape) or (k and shift[here] < np.float32(k) * np.float32(length)):
                continue
            after = (row + steps[k + 1][0], col + steps[k + 1][1])
            short = shift[here] - np.float32(k) * np.float32(length)
            if _inside(*after, shift.shape):
                over = np.float32(k + 1) * np.float32(length) - shift[after]
                out[row, col] = shift[here] + short / (short + over) * (shift[after] - shift[here])
            elif short <= 0.5 * np.float32(length):
                out[row, col] = shift[here]
            break
    return out


def _filled(
    shift: F32, known: Mask, dir_y: float, dir_x: float, drop: np.float32, origin: tuple[int, int] = (0, 0)
) -> F32:
    """`shift` with its unknown stretches filled line by line, as `_sight.fill_unknown` says."""
    down = abs(dir_y) >= abs(dir_x)
    slope = dir_x / dir_y if down else dir_y / dir_x
    ahead = 1 if (dir_y if down else dir_x) >= 0 else -1

    def along(row: int, col: int, step: int) -> tuple[int, int]:
        y, x = row + origin[0], col + origin[1]
        if down:
            return row + step, col + _half_up(slope * (y + step)) - _half_up(slope * y)
        return row + _half_up(slope * (x + step)) - _half_up(slope * x), col + step

    def look(row: int, col: int, step: int) -> tuple[float, int]:
        """The next known shift that way (NaN for none) and how many steps off it is."""
        for count in range(1, sum(shift.shape) + 1):
            row, col = along(row, col, step)
            if not _inside(row, col, shift.shape):
                break
            if known[row, col]:
                return float(shift[row, col]), count
        return math.nan, 0

    out = shift.copy()
    for row, col in np.argwhere(~known):
        before, steps = look(int(row), int(col), -ahead)
        behind, _ = look(int(row), int(col), ahead)
        if math.isnan(before):
            out[row, col] = 0 if math.isnan(behind) else behind
        elif math.isnan(behind):
            out[row, col] = before
        else:
            ramp = np.float32(before)
            for _ in range(steps):
                ramp = np.float32(ramp - drop)
            out[row, col] = max(min(before, behind), float(ramp))
    return out


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
    """Twin of `kernels.gather`: one pixel at a time, whole-number weights of 1/128; a part is padded to its tile."""
    if tile_size is not None:
        rgb, agl_m, raised = _whole(rgb, agl_m, raised, origin, tile_size)
    rows, cols = rgb.shape[:2]
    out_rgb = np.empty((*size, 3), np.uint8)
    out_rgb[:] = fill
    out_agl = np.full(size, np.nan, np.float32)
    inside = np.zeros(size, np.bool_)
    dir_x, dir_y = direction(raised.angle_rad) if raised is not None else (0.0, 0.0)
    for row, col in np.ndindex(*size):
        y, x = (float(m[0]) * row + float(m[2]) + float(m[1]) * col for m in matrix)
        near = _neighbours(y, x, rows, cols)
        if near is None:
            continue
        shift = np.float32(0)
        if raised is not None:
            shift = raised.shift_px[near[2]]
            y, x = y + dir_y * float(shift), x + dir_x * float(shift)
            near = _neighbours(y, x, rows, cols)
            if near is None:
                continue
        (iy, wy), (ix, wx), nearest = near
        four = rgb[np.ix_([iy, min(iy + 1, rows - 1)], [ix, min(ix + 1, cols - 1)])].astype(np.int64)
        across = four[:, 0] * (128 - wx) + four[:, 1] * wx
        out_rgb[row, col] = (across[0] * (128 - wy) + across[1] * wy + 8192) >> 14
        inside[row, col] = True
        if agl_m is not None and math.isfinite(agl_m[nearest]):
            out_agl[row, col] = agl_m[nearest] if raised is None else shift * np.float32(raised.agl_per_shift)
    return out_rgb, None if agl_m is None else out_agl, None if inside.all() else inside


def _whole(
    rgb: U8, agl_m: F32 | None, raised: Raised | None, origin: tuple[int, int], size: tuple[int, int]
) -> tuple[U8, F32 | None, Raised | None]:
    """A tile of `size` from a part of it, whose outermost pixels are repeated."""
    around = [
        (first, whole - first - part) for first, part, whole in zip(origin, rgb.shape, size, strict=False)
    ]
    if raised is not None:
        raised = replace(raised, shift_px=np.pad(raised.shift_px, around, mode="edge"))
    agl_m = None if agl_m is None else np.pad(agl_m, around, mode="edge")
    return np.pad(rgb, [*around, (0, 0)], mode="edge"), agl_m, raised


def _neighbours(
    y: float, x: float, rows: int, cols: int
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None:
    """(first row, weight of the next one), the same of columns, and the nearest pixel; None outside."""
    if not (-0.5 <= y < rows - 0.5 and -0.5 <= x < cols - 0.5):
        return None
    sides = []
    for place, side in ((y, rows), (x, cols)):
        place = min(max(place, 0.0), side - 1.0)
        first = min(int(place), max(side - 2, 0))
        sides.append((first, int((place - first) * 128 + 0.5)))
    nearest = tuple(
        min(first + (weight >= 64), side - 1)
        for (first, weight), side in zip(sides, (rows, cols), strict=True)
    )
    return sides[0], sides[1], (nearest[0], nearest[1])


def tone(rgb: U8, table: U8, noise: npt.NDArray[np.int8] | None = None, random: U8 | None = None) -> U8:
    """Twin of `kernels.tone`: one value at a time."""
    out = rgb.copy()
    for number, (row, col, channel) in enumerate(np.ndindex(*rgb.shape)):
        value = int(table[channel, rgb[row, col, channel]])
        if noise is not None and random is not None:
            value = min(max(value + int(noise[random[number]]), 0), 255)
        out[row, col, channel] = value
    return out
