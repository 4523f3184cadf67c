"""Which pixels of a tile a draw will read, known before any of them is decoded.

`map_of` composes a draw's geometry into one affine map; `needed_window` is the rectangle of the source that
this map shows, widened by the neighbours that interpolation reads and, where heights are raised, by as far as a
line of sight may look: the tallest height times scale times (factor - 1), along the flow's direction. It takes
what a shard tells of a tile besides its pixels, so only this rectangle needs to be read, decoded and warped.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from geopose_dist.augment.draw import Draw, linear_part
from geopose_dist.data.sample import Window
from geopose_dist.geometry import Pose, direction

Matrix = npt.NDArray[np.float64]

NEIGHBOURS_PX = 1
"""What bilinear reading needs around a place, with room for the rounding of corners."""
SIGHT_PX = 3
"""The same where heights are raised: the shift is looked up at the nearest pixel, and lines of sight step by whole
pixels, the last of which lies behind the surface met."""


def map_of(size: tuple[int, int], drawn: Draw) -> tuple[Matrix, tuple[int, int]]:
    """Output (row, column, 1) to the place in the (raised) tile of `size`, float64 [2, 3], and the output's size."""
    rows, cols = size
    back = linear_part(drawn.operations)
    if drawn.window is None:
        # Only exact swaps of the axes swap the sides: a turned tile keeps its size, as it keeps its centre.
        swaps = sum(
            name == "transpose" or (name == "rotate" and value % 180 == 90)
            for name, value in drawn.operations
        )
        out = (cols, rows) if swaps % 2 else (rows, cols)
        centre = np.array([(rows - 1) / 2, (cols - 1) / 2])
    else:
        row, col, out_rows, out_cols = drawn.window
        out = (out_rows, out_cols)
        centre = np.array([row + (out_rows - 1) / 2, col + (out_cols - 1) / 2])
    offset = centre - back @ np.array([(out[0] - 1) / 2, (out[1] - 1) / 2])
    return np.column_stack([back, offset]), out


def reach_px(drawn: Draw, pose: Pose | None, tallest_m: float) -> float:
    """How far along the flow's direction lines of sight may meet a raised surface; 0 if nothing is raised."""
    if drawn.heights is None or pose is None:
        return 0.0
    return max(0.0, tallest_m) * pose.scale_px_per_m * (drawn.heights - 1)


def needed_window(drawn: Draw, size: tuple[int, int], pose: Pose | None, tallest_m: float) -> Window:
    """The part of a tile that `apply` reads for a draw.

    Args:
        drawn: what will be done.
        size: rows and columns of the tile.
        pose: of the tile; None without pose label.
        tallest_m: tallest known height of the tile, 0 without one.

    Returns:
        At least one pixel, also if the draw shows nothing of the tile.
    """
    matrix, out = map_of(size, drawn)
    corners = np.array([[r, c, 1.0] for r in (0, out[0] - 1) for c in (0, out[1] - 1)]) @ matrix.T
    low, high = corners.min(axis=0), corners.max(axis=0)
    reach = reach_px(drawn, pose, tallest_m)
    margin = SIGHT_PX if drawn.heights is not None and drawn.heights > 1 else NEIGHBOURS_PX
    x, y = (0.0, 0.0) if pose is None else direction(pose.angle_rad)
    firsts, counts = [], []
    for axis, along in ((0, y), (1, x)):
        first = math.floor(low[axis] + min(0.0, along * reach)) - margin
        stop = math.ceil(high[axis] + max(0.0, along * reach)) + margin + 1
        first = min(max(first, 0), size[axis] - 1)
        firsts.append(first)
        counts.append(max(min(stop, size[axis]), first + 1) - first)
    return Window(firsts[0], firsts[1], counts[0], counts[1])
