"""Heights, errors and flow as pictures: coloured maps and arrows, for pages and for TensorBoard.

Images are arrays [H, W, 3] of uint8. Unknown pixels are grey everywhere, the true flow is blue and the
predicted one orange.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import matplotlib
import numpy as np
import numpy.typing as npt

from geopose_dist.data.sample import U8
from geopose_dist.geometry import F32, Pose, flow_xy

UNKNOWN = (128, 128, 128)
HEIGHT_MAP, ERROR_MAP = "viridis", "RdBu_r"
TRUE_COLOUR, PREDICTED_COLOUR = (64, 224, 255), (255, 150, 40)


def height_limit(agl_m: F32, least_m: float = 5.0) -> float:
    """Upper end of the colours: the 99.5 % quantile of the known heights, at least `least_m`."""
    known = agl_m[np.isfinite(agl_m)]
    return max(least_m, float(np.quantile(known, 0.995))) if known.size else least_m


def reduced(image: U8, side: int) -> U8:
    """The image with its longer side brought down to `side` pixels; smaller images stay."""
    rows, columns = image.shape[:2]
    factor = side / max(rows, columns)
    if factor >= 1:
        return image
    size = (max(1, round(columns * factor)), max(1, round(rows * factor)))
    small: U8 = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    return small


def coloured(values: F32, low: float, high: float, map_name: str) -> U8:
    """Values [H, W] as colours [H, W, 3] of a matplotlib map between `low` and `high`; NaN is grey."""
    share = (values - low) / max(high - low, 1e-9)
    colours: U8 = matplotlib.colormaps[map_name](np.nan_to_num(share), bytes=True)[..., :3]
    colours[np.isnan(values)] = UNKNOWN
    return colours


def with_arrows(
    rgb: U8, agl_m: F32, poses: Sequence[tuple[Pose, F32, tuple[int, int, int]]], side: int = 360
) -> tuple[U8, int]:
    """The image, brought near `side` pixels, with flow arrows at the tallest pixel of each of up to 7 x 7 cells.

    Args:
        rgb: uint8 [H, W, 3].
        agl_m: float32 [H, W]: where the tall things are; NaN is passed over.
        poses: for each set of arrows its pose, its heights [H, W] and its colour.
        side: longer side of the result in pixels.

    Returns:
        The image, and the whole factor by which arrows are drawn longer than they are.
    """
    picture = np.array(reduced(rgb, side), order="C")  # a copy: arrows must not get into `rgb` itself
    enlarged = side // max(picture.shape)
    if enlarged >= 2:  # arrows over a small picture would hide it
        picture = picture.repeat(enlarged, axis=0).repeat(enlarged, axis=1)
    spots = _tall_spots(agl_m)
    shrink = picture.shape[0] / rgb.shape[0]
    flows = [(*flow_xy(agl, pose.scale_px_per_m, pose.angle_rad), colour) for pose, agl, colour in poses]
    longest = max((float(np.hypot(dx[s], dy[s])) for dx, dy, _ in flows for s in spots), default=0.0) * shrink
    factor = int(np.clip(0.12 * side // max(longest, 1e-6), 1, 8))
    for width, outline in ((4, True), (2, False)):
        for dx, dy, colour in flows:
            for row, column in spots:
                along = np.array([dx[row, column], dy[row, column]], np.float64) * shrink * factor
                if not np.isfinite(along).all():
                    continue
                along *= min(
                    1.0, 4 * side / max(float(np.hypot(*along)), 1e-6)
                )  # an untrained network's may be any
                start = np.array([column + 0.5, row + 0.5]) * shrink
                ends = [tuple(map(int, np.rint(point * 16))) for point in (start, start + along)]
                ink = (0, 0, 0) if outline else colour
                cv2.arrowedLine(picture, ends[0], ends[1], ink, width, cv2.LINE_AA, shift=4, tipLength=0.3)
    return picture, factor


def _tall_spots(agl_m: F32, cells: int = 7, least_m: float = 2.0) -> list[tuple[int, int]]:
    """(row, column) of the tallest known pixel of each cell of a grid, where it is at least `least_m`."""
    rows, columns = agl_m.shape
    known = np.where(np.isnan(agl_m), -np.inf, agl_m)
    spots = []
    for top, bottom in zip(*_bounds(rows, cells), strict=True):
        for left, right in zip(*_bounds(columns, cells), strict=True):
            cell = known[top:bottom, left:right]
            row, column = np.unravel_index(int(cell.argmax()), cell.shape)
            if cell[row, column] >= least_m:
                spots.append((int(top + row), int(left + column)))
    return spots


def _bounds(length: int, cells: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    edges = np.unique(np.linspace(0, length, cells + 1).astype(int))
    return edges[:-1], edges[1:]
