"""A tile as a height mesh without its lean: vertices at ground position, no triangle across what hides something.

Every vertex is a pixel of the oblique image, moved by its flow and raised by its height, so the wall that the
camera saw stands upright and keeps its own pixels. Where the surface jumps away from the camera, at the far
side of a building, a triangle would be a curtain from the roof to the ground beyond: it is cut, and a plain wall
is put under the edge instead. What was never seen stays a hole, and so does what stands outside the tile's own
ground. Specks of unknown heights, a pixel or two wide, are closed: as holes they would hide the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geopose_dist.geometry import F32, F64, Pose, direction

SIDE = 512
"""Vertices along the longer side at most: half a million triangles are easy for a phone."""
SLACK_PX = 2.5
"""A triangle's edge may be this much longer on the ground than in the image, or its image length if that is more:
a roof that falls away from the camera stretches to about twice its length, a jump to much more."""
LEAST_DROP_M = 1.0
"""Walls are put under edges that stand this far above what lies beyond."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Mesh:
    """Vertices in raster order of a grid [r, c] over the image; ground positions follow from heights and pose.

    Attributes:
        rows: image row of each grid row, pixel centres, float64 [r].
        columns: image column of each grid column, float64 [c].
        agl_m: float32 [r, c], NaN unknown.
        kept: bool [r - 1, c - 1, 2]: which of a cell's triangles are drawn: (upper left, lower left, upper
            right) and (lower right, upper right, lower left).
        walls: int64 [n, 2]: edges of kept triangles under which a wall reaches down to the ground.
    """

    rows: F64
    columns: F64
    agl_m: F32
    kept: npt.NDArray[np.bool_]
    walls: npt.NDArray[np.int64]


def build(agl_m: F32, pose: Pose, side: int = SIDE) -> Mesh:
    """The mesh of heights [H, W] in metres (NaN unknown), at most `side` vertices along the longer side.

    Heights are taken at the nearest pixel: a mean of roof and ground would be a wall that is not there.
    """
    picked = [_picked(length, side, max(agl_m.shape)) for length in agl_m.shape]
    heights = _without_specks(agl_m)[np.ix_(picked[0], picked[1])]
    rows, columns = (numbers.astype(np.float64) + 0.5 for numbers in picked)
    y, x = ground(heights, rows, columns, pose)
    kept, cut = _triangles(heights, y, x, rows, columns)
    inside = (y >= 0) & (y <= agl_m.shape[0]) & (x >= 0) & (x <= agl_m.shape[1])
    kept &= _of_triangles(inside)
    return Mesh(rows, columns, heights, kept, _walls(heights, kept, cut))


def ground(agl_m: F32, rows: F64, columns: F64, pose: Pose) -> tuple[F64, F64]:
    """Ground position (row, column), each float64 [r, c], of grid vertices; NaN where heights are."""
    dx, dy = direction(pose.angle_rad)
    magnitude = agl_m.astype(np.float64) * pose.scale_px_per_m
    return rows[:, None] + magnitude * dy, columns[None, :] + magnitude * dx


def _picked(length: int, side: int, longest: int) -> npt.NDArray[np.int64]:
    """Indices of the pixels that become vertices, spread evenly."""
    count = max(2, round(length * min(1.0, side / longest)))
    return np.minimum(((np.arange(count) + 0.5) * length / count).astype(np.int64), length - 1)


def _corners(plane: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
    """Upper left, upper right, lower left and lower right value of every cell of a grid."""
    return [plane[:-1, :-1], plane[:-1, 1:], plane[1:, :-1], plane[1:, 1:]]


def _triangles(agl_m: F32, y: F64, x: F64, rows: F64, columns: F64) -> tuple[Mask, Mask]:
    """Triangles to draw, and triangles of known heights that are cut, each bool [r - 1, c - 1, 2]."""
    image_y, image_x = np.broadcast_to(rows[:, None], y.shape), np.broadcast_to(columns, x.shape)
    ys, xs, image_ys, image_xs = (_corners(plane) for plane in (y, x, image_y, image_x))

    def long(a: int, b: int) -> Mask:
        moved = np.hypot(ys[a] - ys[b], xs[a] - xs[b])  # type: ignore[operator]
        seen = np.hypot(image_ys[a] - image_ys[b], image_xs[a] - image_xs[b])  # type: ignore[operator]
        too_long: Mask = moved - seen > np.maximum(SLACK_PX, seen)
        return too_long

    with np.errstate(invalid="ignore"):  # NaN compares as not long
        diagonal = long(1, 2)
        cut = np.stack([long(0, 1) | long(0, 2) | diagonal, long(3, 2) | long(3, 1) | diagonal], axis=-1)
    known = _of_triangles(np.isfinite(agl_m))
    return known & ~cut, known & cut


def _of_triangles(vertices: Mask) -> Mask:
    """Triangles [r - 1, c - 1, 2] all of whose corners are in a mask [r, c]."""
    upper_left, upper_right, lower_left, lower_right = (np.asarray(corner) for corner in _corners(vertices))
    both = upper_right & lower_left
    return np.stack([upper_left & both, lower_right & both], axis=-1)


def _without_specks(agl_m: F32) -> F32:
    """The heights, those unknown pixels filled that have at least five known ones around them; twice."""
    filled = agl_m
    for _ in range(2):
        unknown = np.isnan(filled)
        if not unknown.any():
            break
        framed = np.pad(filled, 1, constant_values=np.nan)
        rows, columns = np.nonzero(unknown)
        around = np.stack(
            [framed[rows + i, columns + j] for i in range(3) for j in range(3) if (i, j) != (1, 1)]
        )
        enough = np.isfinite(around).sum(axis=0) >= 5
        filled = filled.copy()
        filled[rows[enough], columns[enough]] = np.nanmedian(around[:, enough], axis=0)
    return filled


def _walls(agl_m: F32, kept: Mask, cut: Mask) -> npt.NDArray[np.int64]:
    """Edges between a kept and a cut triangle that stand above the cut triangle's third corner, int64 [n, 2]."""
    rows, columns = agl_m.shape
    number = np.arange(rows * columns).reshape(rows, columns)
    height = agl_m.ravel()
    upper_left, upper_right, lower_left, lower_right = (np.asarray(k) for k in _corners(number))
    found = []

    def take(
        a: npt.NDArray[np.int64], b: npt.NDArray[np.int64], third: npt.NDArray[np.int64], on: Mask
    ) -> None:
        ends, beyond = np.stack([a[on], b[on]], axis=-1), third[on]
        found.append(ends[height[ends].mean(axis=1) - height[beyond] >= LEAST_DROP_M])

    first, second = kept[..., 0], kept[..., 1]
    no_first, no_second = cut[..., 0], cut[..., 1]
    take(upper_right, lower_left, upper_left, second & no_first)
    take(upper_right, lower_left, lower_right, first & no_second)
    # Between a cell's second triangle and the first one of the cell to its right, and of the cell below it.
    take(upper_right[:, :-1], lower_right[:, :-1], lower_left[:, :-1], first[:, 1:] & no_second[:, :-1])
    take(upper_left[:, 1:], lower_left[:, 1:], upper_right[:, 1:], second[:, :-1] & no_first[:, 1:])
    take(lower_left[:-1], lower_right[:-1], upper_right[:-1], first[1:] & no_second[:-1])
    take(upper_left[1:], upper_right[1:], lower_left[1:], second[:-1] & no_first[1:])
    return np.concatenate(found)
