"""The yardstick: augmentation done the way the public benchmark does it, one operation after another.

Written from its recorded outputs, with NumPy and OpenCV, and made quick where that changes no output: it is to be
a fair opponent. It repeats the benchmark's faults (DOMAIN section 5), because its speed is what
is compared and its results are what was recorded; nothing but benchmarks and their tests may use it.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from geopose_dist.geometry import F32, direction

U8 = npt.NDArray[np.uint8]
I16 = npt.NDArray[np.int16]


def invert_flow(flow_xy: I16, magnitude_px: F32, fac: float) -> tuple[F32, U8]:
    """Forward splat onto a grid reduced by `fac`; the largest magnitude wins.

    Args:
        flow_xy: int16 [H, W, 2].
        magnitude_px: float32 [H, W].
        fac: size of the grid, as a share of the tile (1/2 and 1/4 were recorded).

    Returns:
        (flow float32 [H, W, 2] of what landed, 0 in holes, mask uint8 [H, W], 255 in holes), both enlarged
        bilinearly.
    """
    rows, cols = magnitude_px.shape
    grid_rows, grid_cols = int(rows * fac), int(cols * fac)
    share = np.float32(fac)
    to_row = np.floor((np.arange(rows, dtype=np.float32)[:, None] + flow_xy[..., 1]) * share).astype(np.int32)
    to_col = np.floor((np.arange(cols, dtype=np.float32)[None, :] + flow_xy[..., 0]) * share).astype(np.int32)
    lands = (to_row >= 0) & (to_row < grid_rows) & (to_col >= 0) & (to_col < grid_cols)
    nowhere = grid_rows * grid_cols
    cell = np.where(lands, to_row * grid_cols + to_col, nowhere).ravel()
    tallest = np.full(nowhere + 1, -1, np.float32)
    np.maximum.at(tallest, cell, magnitude_px.ravel())
    won = np.flatnonzero(tallest[cell] == magnitude_px.ravel())
    landed = np.zeros((nowhere + 1, 2), np.int16)
    landed[cell[won]] = flow_xy.reshape(-1, 2)[won]
    holes = np.where(tallest[:-1] < 0, np.uint8(255), np.uint8(0)).reshape(grid_rows, grid_cols)
    flow = landed[:-1].reshape(grid_rows, grid_cols, 2).astype(np.float32)
    return _resized(flow, (cols, rows)), _resized(holes, (cols, rows))


def _resized(image: Any, size: tuple[int, int]) -> Any:
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)


def warp_heights(
    rgb: U8, agl_m: F32, scale_px_per_m: float, angle_rad: float, factor: float
) -> tuple[U8, F32, F32]:
    """Heights times `factor`: (rgb, agl_m, magnitude_px)."""
    rows, cols = agl_m.shape
    magnitude = cv2.medianBlur(agl_m * np.float32(scale_px_per_m), 5)
    x, y = direction(angle_rad)
    flow = np.empty((rows, cols, 2), np.int16)
    flow[..., 0] = magnitude * np.float64(-(factor - 1) * x) + 0.5
    flow[..., 1] = magnitude * np.float64(-(factor - 1) * y) + 0.5
    inverse, _ = invert_flow(flow, magnitude, 0.5)  # type: ignore[arg-type]
    map_x = np.arange(cols, dtype=np.float32)[None, :] - cv2.medianBlur(
        np.ascontiguousarray(inverse[..., 0]), 5
    )
    map_y = np.arange(rows, dtype=np.float32)[:, None] - cv2.medianBlur(
        np.ascontiguousarray(inverse[..., 1]), 5
    )
    out_rgb = cv2.blur(cv2.remap(rgb, map_x, map_y, cv2.INTER_LINEAR), (3, 3))
    out_agl = cv2.remap(agl_m, map_x, map_y, cv2.INTER_LINEAR) * np.float32(factor)
    out_magnitude = cv2.remap(magnitude, map_x, map_y, cv2.INTER_LINEAR) * np.float32(factor)
    return out_rgb, out_agl, out_magnitude  # type: ignore[return-value]


def rotate(rgb: U8, agl_m: F32, magnitude_px: F32, degrees: float) -> tuple[U8, F32, F32]:
    """Counter-clockwise about the centre; corners become 0."""
    rows, cols = agl_m.shape
    matrix = cv2.getRotationMatrix2D((cols / 2, rows / 2), degrees, 1)
    return (
        cv2.warpAffine(rgb, matrix, (cols, rows), flags=cv2.INTER_LINEAR),
        cv2.warpAffine(agl_m, matrix, (cols, rows), flags=cv2.INTER_NEAREST),
        cv2.warpAffine(magnitude_px, matrix, (cols, rows), flags=cv2.INTER_NEAREST),
    )  # type: ignore[return-value]


def flip(rgb: U8, agl_m: F32, magnitude_px: F32, code: int) -> tuple[U8, F32, F32]:
    """Mirror left and right (1) or top and bottom (0)."""
    return cv2.flip(rgb, code), cv2.flip(agl_m, code), cv2.flip(magnitude_px, code)  # type: ignore[return-value]


def zoom(rgb: U8, agl_m: F32, magnitude_px: F32, factor: float) -> tuple[U8, F32, F32]:
    """Shrink in the middle of the tile; around it colour 0 and unknown heights; the magnitude's fault 1."""
    rows, cols = agl_m.shape
    small_rows, small_cols = int(rows * factor), int(cols * factor)
    top, left = (rows - small_rows) // 2, (cols - small_cols) // 2
    inner = np.s_[top : top + small_rows, left : left + small_cols]
    results: list[Any] = []
    for image, around in ((rgb, 0), (agl_m, np.nan), (magnitude_px, np.nan)):
        canvas = np.full_like(image, around)
        canvas[inner] = cv2.resize(image, (small_cols, small_rows), interpolation=cv2.INTER_NEAREST)
        results.append(canvas)
    results[2][inner] /= np.float32(factor)
    return results[0], results[1], results[2]


def augment(
    rgb: U8, agl_m: F32, scale_px_per_m: float, angle_rad: float, drawn: dict[str, float]
) -> tuple[U8, F32, F32, float, float]:
    """One sample: of heights, rotate, flip_x, flip_y and zoom those that `drawn` names, in this order.

    Returns:
        (rgb, agl_m, magnitude_px, scale_px_per_m, angle_rad).
    """
    if "heights" in drawn:
        rgb, agl_m, magnitude = warp_heights(rgb, agl_m, scale_px_per_m, angle_rad, drawn["heights"])
    else:
        magnitude = agl_m * np.float32(scale_px_per_m)
    if "rotate" in drawn:
        rgb, agl_m, magnitude = rotate(rgb, agl_m, magnitude, drawn["rotate"])
        angle_rad += math.radians(drawn["rotate"])
    if "flip_x" in drawn:
        rgb, agl_m, magnitude = flip(rgb, agl_m, magnitude, 1)
        angle_rad = -angle_rad
    if "flip_y" in drawn:
        rgb, agl_m, magnitude = flip(rgb, agl_m, magnitude, 0)
        angle_rad = math.pi - angle_rad
    if "zoom" in drawn:
        rgb, agl_m, magnitude = zoom(rgb, agl_m, magnitude, drawn["zoom"])
        scale_px_per_m /= drawn["zoom"]
    return rgb, agl_m, magnitude, scale_px_per_m, angle_rad
