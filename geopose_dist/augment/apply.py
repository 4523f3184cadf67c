"""The other half of augmentation: do what a `Draw` says, with no randomness left.

All geometry of a draw is composed into one map and the pixels are fetched once, and only those of the crop:
heights are raised in the part of the tile that the crop's lines of sight can reach. Labels go through
`geometry.Pose`, operation by operation. Unknown heights are NaN, and so is everything outside the tile, where
`View.inside` is False.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from geopose_dist import kernels
from geopose_dist.augment.draw import Draw, draw, linear_part
from geopose_dist.augment.recipe import AugmentRecipe
from geopose_dist.augment.tone import apply_tone
from geopose_dist.data.sample import U8, View
from geopose_dist.geometry import F32, Pose, direction

MAX_FACTOR = 10.0
"""Heights are raised by at most this: beyond it a mix-up of arguments is likelier than a wish."""

Matrix = npt.NDArray[np.float64]
_SAME: Matrix = np.array([[1.0, 0, 0], [0, 1.0, 0]])


def raise_heights(
    rgb: U8, agl_m: F32, scale_px_per_m: float, angle_rad: float, factor: float
) -> tuple[U8, F32]:
    """The tile as it would look if everything on it were `factor` times as high.

    Args:
        rgb: uint8 [H, W, 3].
        agl_m: float32 [H, W] metres, NaN = unknown; heights below 0 count as 0.
        scale_px_per_m: flow pixels per metre, finite and > 0; it stays the same.
        angle_rad: flow direction; it stays the same.
        factor: 1 to 10; exactly 1 changes nothing.

    Returns:
        (rgb, agl_m) of the same sizes. Every pixel shows the first surface that its line of sight meets, so
        facades stretch and what they hide is hidden. The height is NaN where that surface's is unknown or the
        line leaves the tile; the colour there is 0 if it left.
    """
    if not (math.isfinite(factor) and 1 <= factor <= MAX_FACTOR):
        raise ValueError(f"factor is {factor}; wanted a finite number from 1 to {MAX_FACTOR:g}")
    kernels.check_tile(rgb, agl_m, scale_px_per_m, angle_rad)
    if factor == 1:
        return rgb.copy(), agl_m.copy()
    raised = _raised(agl_m, scale_px_per_m, angle_rad, factor)
    out_rgb, out_agl, _ = kernels.gather(rgb, agl_m, _SAME, agl_m.shape, raised)
    assert out_agl is not None
    return out_rgb, out_agl


def _raised(agl_m: F32, scale_px_per_m: float, angle_rad: float, factor: float) -> kernels.Raised:
    per_m = scale_px_per_m * (factor - 1)
    shift = kernels.invert_flow(agl_m, per_m, angle_rad, facade_px_per_px=factor - 1)
    return kernels.Raised(shift, angle_rad, factor / per_m)


def apply(view: View, drawn: Draw) -> View:
    """The view after everything that `drawn` says; the view given is not changed."""
    matrix, size = _map(view, drawn)
    rgb, agl_m, inside_before, raised = view.rgb, view.agl_m, view.inside, None
    pose = view.pose
    if drawn.heights is not None and drawn.heights > 1:
        assert agl_m is not None, "draw() skips heights that are not known"
        assert pose is not None, "draw() skips heights without a pose"
        part = _within_reach(agl_m, pose, drawn.heights, matrix, size)
        rgb, agl_m = rgb[part], np.ascontiguousarray(agl_m[part])
        inside_before = None if inside_before is None else inside_before[part]
        matrix = matrix - np.array([[0, 0, part[0].start], [0, 0, part[1].start]])
        raised = _raised(agl_m, pose.scale_px_per_m, pose.angle_rad, drawn.heights)
    if raised is None and view.inside is None and np.array_equal(matrix, _SAME) and size == rgb.shape[:2]:
        out_rgb, out_agl, inside = rgb, agl_m, None
    else:
        out_rgb, out_agl, inside = kernels.gather(rgb, agl_m, matrix, size, raised)
    if inside_before is not None:
        plane = np.where(inside_before, np.float32(1), np.float32(np.nan))
        _, seen, _ = kernels.gather(rgb, plane, matrix, size, raised)
        assert seen is not None
        inside = np.isfinite(seen)
        inside = None if inside.all() else inside
    if drawn.faults:
        out_rgb, out_agl, inside = _with_faults(drawn, out_rgb, out_agl, inside)
    if drawn.tone is not None:
        out_rgb = apply_tone(out_rgb, drawn.tone)
        if inside is not None:
            out_rgb[~inside] = 0
    pose_after = _pose_after(pose or Pose(0.0, 1.0, view.gsd_m), drawn)
    return dataclasses.replace(
        view,
        rgb=out_rgb,
        agl_m=out_agl,
        inside=inside,
        gsd_m=pose_after.gsd_m,
        scale_px_per_m=None if pose is None else pose_after.scale_px_per_m,
        angle_rad=None if pose is None else pose_after.angle_rad,
    )


def _map(view: View, drawn: Draw) -> tuple[Matrix, tuple[int, int]]:
    """Output (row, column, 1) to the place in the raised tile, and the output's size."""
    rows, cols = view.rgb.shape[:2]
    back = linear_part(drawn.operations)
    if drawn.window is None:
        # Only exact swaps of the axes swap the sides: a turned tile keeps its size, as it keeps its centre.
        swaps = sum(
            name == "transpose" or (name == "rotate" and value % 180 == 90)
            for name, value in drawn.operations
        )
        size = (cols, rows) if swaps % 2 else (rows, cols)
        centre = np.array([(rows - 1) / 2, (cols - 1) / 2])
    else:
        row, col, out_rows, out_cols = drawn.window
        size = (out_rows, out_cols)
        centre = np.array([row + (out_rows - 1) / 2, col + (out_cols - 1) / 2])
    offset = centre - back @ np.array([(size[0] - 1) / 2, (size[1] - 1) / 2])
    return np.column_stack([back, offset]), size


def _within_reach(
    agl_m: F32, pose: Pose, factor: float, matrix: Matrix, size: tuple[int, int]
) -> tuple[slice, slice]:
    """The part of the tile that the output's lines of sight can meet."""
    corners = np.array([[r, c, 1.0] for r in (0, size[0] - 1) for c in (0, size[1] - 1)]) @ matrix.T
    low, high = corners.min(axis=0), corners.max(axis=0)
    rows, cols = agl_m.shape
    if low[0] <= 0 and low[1] <= 0 and high[0] >= rows - 1 and high[1] >= cols - 1:
        return slice(0, rows), slice(0, cols)
    reach = max(0.0, float(np.fmax.reduce(agl_m, axis=None))) * pose.scale_px_per_m * (factor - 1)
    x, y = direction(pose.angle_rad)
    parts = []
    for axis, along, side in ((0, y, rows), (1, x, cols)):
        start = max(0, math.floor(low[axis] + min(0.0, along * reach)) - 3)
        stop = min(side, math.ceil(high[axis] + max(0.0, along * reach)) + 4)
        start = min(start, side - 1)
        parts.append(slice(start, max(stop, start + 1)))
    return parts[0], parts[1]


def _pose_after(pose: Pose, drawn: Draw) -> Pose:
    for name, value in drawn.operations:
        if name == "rotate":
            pose = pose.rotated(value)
        elif name == "zoom":
            after = pose.zoomed(value)
            pose = (
                dataclasses.replace(after, scale_px_per_m=pose.scale_px_per_m / value)
                if drawn.faults
                else after
            )
        elif name == "flip_x":
            pose = pose.flipped_x()
        elif name == "flip_y":
            pose = pose.flipped_y()
        else:
            pose = pose.transposed()
    return pose


def _with_faults(
    drawn: Draw, rgb: U8, agl_m: F32 | None, inside: kernels.Mask | None
) -> tuple[U8, F32 | None, kernels.Mask | None]:
    """The benchmark's faults 3 and 5: corners of a rotation are height 0, and a raised image is blurred."""
    if drawn.heights is not None:
        padded = np.pad(rgb, ((1, 1), (1, 1), (0, 0)), mode="edge").astype(np.uint16)
        rows, cols = rgb.shape[:2]
        nine = sum(padded[r : r + rows, c : c + cols] for r in range(3) for c in range(3))
        rgb = ((np.asarray(nine, np.uint16) + 4) // 9).astype(np.uint8)
    if inside is not None and any(name == "rotate" for name, _ in drawn.operations):
        if agl_m is not None:
            agl_m = np.where(inside, agl_m, np.float32(0))
        inside = None
    return rgb, agl_m, inside


@dataclasses.dataclass(frozen=True)
class Augmenter:
    """A recipe and a crop as a callable for the loader; holds no state, so every worker may have a copy.

    Attributes:
        recipe: what may be drawn.
        crop_px: side of the random crop; None = whole tiles.
    """

    recipe: AugmentRecipe
    crop_px: int | None = None

    def __post_init__(self) -> None:
        if self.crop_px is not None and self.crop_px < 1:
            raise ValueError(f"crop_px is {self.crop_px}; wanted at least 1, or null for whole tiles")

    def __call__(self, view: View, rng: np.random.Generator) -> View:
        """`apply(view, draw(...))`."""
        return apply(view, draw(self.recipe, rng, view, self.crop_px))
