"""The other half of augmentation: do what a `Draw` says, with no randomness left.

All geometry of a draw is composed into one map and the pixels are fetched once, and only those of the crop:
heights are raised in the part of the tile that the crop's lines of sight can reach (`window`), and a view that
holds only this part gives the bytes of the whole tile. Labels go through `geometry.Pose`, operation by operation.
Unknown heights are NaN, and so is everything outside the tile, where `View.inside` is False.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from geopose_dist import kernels
from geopose_dist.augment import shadows
from geopose_dist.augment.draw import Draw, draw
from geopose_dist.augment.recipe import MAX_FACTOR, AugmentRecipe
from geopose_dist.augment.tone import apply_tone
from geopose_dist.augment.window import Matrix, map_of, needed_window
from geopose_dist.data.sample import U8, Outline, View, Window
from geopose_dist.geometry import F32, Pose

_SAME: Matrix = np.array([[1.0, 0, 0], [0, 1.0, 0]])


def raise_heights(
    rgb: U8,
    agl_m: F32,
    scale_px_per_m: float,
    angle_rad: float,
    factor: float,
    *,
    sun_px_per_m: tuple[float, float] | None = None,
) -> tuple[U8, F32]:
    """The tile as it would look if everything on it were `factor` times as high.

    Args:
        rgb: uint8 [H, W, 3].
        agl_m: float32 [H, W] metres, NaN = unknown; heights below 0 count as 0.
        scale_px_per_m: flow pixels per metre, finite and > 0; it stays the same.
        angle_rad: flow direction; it stays the same.
        factor: 1 to 10; exactly 1 changes nothing.
        sun_px_per_m: (rows, columns) towards the sun per metre of climb: shadows grow with the heights (see
            shadows.py and docs/decisions.md). None: they stay as they were, and 4 to 18 % of a city's pixels lie
            in the wrong light when all is raised by 1.3 to 2.

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
    if sun_px_per_m is not None:
        sight = scale_px_per_m, angle_rad
        out_rgb = shadows.lengthen((rgb, agl_m), (out_rgb, out_agl), *sight, factor, sun_px_per_m)
    return out_rgb, out_agl


def _raised(
    agl_m: F32, scale_px_per_m: float, angle_rad: float, factor: float, origin: tuple[int, int] = (0, 0)
) -> kernels.Raised:
    per_m = scale_px_per_m * (factor - 1)
    shift = kernels.invert_flow(agl_m, per_m, angle_rad, facade_px_per_px=factor - 1, origin=origin)
    return kernels.Raised(shift, angle_rad, factor / per_m)


def apply(view: View, drawn: Draw) -> View:
    """The view after everything that `drawn` says; the view given is not changed.

    Raises:
        ValueError: the view's arrays are not those of a tile, or it is a part (`View.part`) that lacks some of the
            `needed_window` of this draw.
    """
    _check(view)
    matrix, size = map_of(view.size, drawn)
    need = needed_window(drawn, view.size, view.pose, view.tallest_m if drawn.heights is not None else 0.0)
    here = Window(0, 0, *view.size) if view.part is None else view.part.window
    if view.part is not None and _within(here, need) != need:
        raise ValueError(f"view.part is {here}; wanted one that holds {need}, which the draw needs")
    rgb, agl_m, inside_before, raised, pose = view.rgb, view.agl_m, view.inside, None, view.pose
    if drawn.heights is not None and drawn.heights > 1:
        if agl_m is None or pose is None:  # draw() skips such heights, but a Draw may be written by hand
            lacks = "heights" if agl_m is None else "pose"
            raise ValueError(
                f"drawn.heights is {drawn.heights}; wanted None for {view.key}, which has no {lacks}"
            )
        part = Window(need.row - here.row, need.col - here.col, need.rows, need.cols).slices
        rgb, agl_m, here = rgb[part], np.ascontiguousarray(agl_m[part]), need
        inside_before = None if inside_before is None else inside_before[part]
        raised = _raised(agl_m, pose.scale_px_per_m, pose.angle_rad, drawn.heights, here[:2])
    origin, tile_size = here[:2], view.size
    whole = here == (0, 0, *size)
    if raised is None and view.inside is None and whole and np.array_equal(matrix, _SAME):
        out_rgb, out_agl, inside = rgb, agl_m, None
    else:
        out_rgb, out_agl, inside = kernels.gather(
            rgb, agl_m, matrix, size, raised, origin=origin, tile_size=tile_size
        )
    if inside_before is not None:
        plane = np.where(inside_before, np.float32(1), np.float32(np.nan))
        _, seen, _ = kernels.gather(rgb, plane, matrix, size, raised, origin=origin, tile_size=tile_size)
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
        part=None,
        gsd_m=pose_after.gsd_m,
        scale_px_per_m=None if pose is None else pose_after.scale_px_per_m,
        angle_rad=None if pose is None else pose_after.angle_rad,
    )


def _check(view: View) -> None:
    """ValueError unless the view's arrays are those of a tile or of the part that it says it is."""
    shape = np.shape(view.rgb)
    if not isinstance(view.rgb, np.ndarray) or view.rgb.dtype != np.uint8 or shape[2:] != (3,):
        raise ValueError(f"view.rgb is {_said(view.rgb)}; wanted uint8 [H, W, 3]")
    for name, plane, kind in (("agl_m", view.agl_m, np.float32), ("inside", view.inside, np.bool_)):
        if plane is not None and (plane.dtype != kind or plane.shape != shape[:2]):
            raise ValueError(
                f"view.{name} is {_said(plane)}; wanted {np.dtype(kind)} {list(shape[:2])} as rgb is"
            )
    if view.part is not None:
        window, tile = view.part.window, Window(0, 0, *view.part.size)
        if window[2:] != shape[:2] or _within(tile, window) != window:
            raise ValueError(
                f"view.part is {view.part} with rgb {_said(view.rgb)}; wanted the place of its pixels"
            )


def _said(value: object) -> str:
    return (
        f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
    )


def _within(outer: Window, inner: Window) -> Window:
    """What of `inner` lies in `outer`."""
    row, col = max(outer.row, inner.row), max(outer.col, inner.col)
    stop_row = min(outer.row + outer.rows, inner.row + inner.rows)
    stop_col = min(outer.col + outer.cols, inner.col + inner.cols)
    return Window(row, col, stop_row - row, stop_col - col)


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
        return self.apply(view, self.draw(view, rng))

    def draw(self, tile: View | Outline, rng: np.random.Generator) -> Draw:
        """What this sample gets, before it is decoded."""
        return draw(self.recipe, rng, tile, self.crop_px)

    def window(self, tile: Outline, drawn: Draw) -> Window:
        """What has to be decoded of a tile for a draw."""
        return needed_window(drawn, tile.size, tile.pose, tile.tallest_m)

    def apply(self, view: View, drawn: Draw) -> View:
        """See `apply`."""
        return apply(view, drawn)
