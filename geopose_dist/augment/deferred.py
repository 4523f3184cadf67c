"""Augmentation left to the device: what a worker still does of it (`augment.where: device`).

Draw as ever, write the labels as they will be, cut the part of the tile that the output can show, raised heights
included, and put everything that is left to do into numbers (`data.deferred.Deferred`). No pixel is resampled
here. The device's half is model/device_augment.py.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from geopose_dist.augment.apply import Augmenter, Matrix, _map, _pose_after
from geopose_dist.augment.draw import Draw, draw
from geopose_dist.augment.recipe import AugmentRecipe
from geopose_dist.augment.tone import noise_of, table
from geopose_dist.data.deferred import Deferred, Raising, Toning
from geopose_dist.data.sample import View
from geopose_dist.geometry import Pose, direction

MARGIN_PX = 3
"""What is cut is this much larger than what can be reached: nearest pixels, bilinear neighbours, rounding."""


def defer(view: View, drawn: Draw) -> View:
    """The part of `view` that `drawn` needs, with the labels that it will have and what is left to do."""
    assert not drawn.faults, "AugmentRecipe refuses faithful on the device"
    assert view.inside is None, "tiles come whole from the reader"
    matrix, size = _map(view, drawn)
    pose, raising, reach_px = view.pose, None, 0.0
    if drawn.heights is not None and drawn.heights > 1:
        assert view.agl_m is not None, "draw() skips heights that are not known"
        assert pose is not None, "draw() skips heights without a pose"
        tallest_m = float(np.fmax.reduce(view.agl_m, axis=None))
        per_m = pose.scale_px_per_m * (drawn.heights - 1)
        raising = Raising(per_m, pose.angle_rad, drawn.heights - 1, drawn.heights / per_m, tallest_m)
        reach_px = tallest_m * per_m
    part = _part(view, matrix, size, reach_px)
    offset = matrix - np.array([[0, 0, part[0].start], [0, 0, part[1].start]])
    agl_m = None if view.agl_m is None else view.agl_m[part]
    rows, cols = part[0].stop - part[0].start, part[1].stop - part[1].start
    (a, b, c), (d, e, f) = offset.tolist()
    toning = None
    if drawn.tone is not None:
        noise = noise_of(drawn.tone)
        toning = Toning(table(drawn.tone), noise if noise.any() else None, drawn.tone.noise_seed)
    after = _pose_after(pose or Pose(0.0, 1.0, view.gsd_m), drawn)
    return dataclasses.replace(
        view,
        rgb=view.rgb[part],
        agl_m=agl_m,
        gsd_m=after.gsd_m,
        scale_px_per_m=None if pose is None else after.scale_px_per_m,
        angle_rad=None if pose is None else after.angle_rad,
        deferred=Deferred(size, ((a, b, c), (d, e, f)), (rows, cols), raising, toning),
    )


def _part(view: View, matrix: Matrix, size: tuple[int, int], reach_px: float) -> tuple[slice, slice]:
    """Rows and columns of the tile that the output shows, or that lines of sight meet `reach_px` away."""
    corners = np.array([[r, c, 1.0] for r in (0, size[0] - 1) for c in (0, size[1] - 1)]) @ matrix.T
    low, high = corners.min(axis=0), corners.max(axis=0)
    x, y = (0.0, 0.0) if view.angle_rad is None else direction(view.angle_rad)
    parts = []
    for axis, along in ((0, y), (1, x)):
        side = view.rgb.shape[axis]
        start = math.floor(low[axis] + min(0.0, along * reach_px)) - MARGIN_PX
        stop = math.ceil(high[axis] + max(0.0, along * reach_px)) + MARGIN_PX + 1
        start = min(max(start, 0), side - 1)
        parts.append(slice(start, max(min(stop, side), start + 1)))
    return parts[0], parts[1]


@dataclass(frozen=True)
class Deferrer:
    """A recipe and a crop as a callable for the loader, as `Augmenter`, but the pixels are left to the device.

    Attributes:
        recipe: what may be drawn.
        crop_px: side of the random crop; None = whole tiles.
    """

    recipe: AugmentRecipe
    crop_px: int | None = None

    def __call__(self, view: View, rng: np.random.Generator) -> View:
        """`defer(view, draw(...))`."""
        return defer(view, draw(self.recipe, rng, view, self.crop_px))

    def ships_px(self, rows: int, cols: int) -> tuple[int, int]:
        """Rows and columns at most of what is shipped of a tile; raised heights may be met from anywhere in it."""
        settings = self.recipe.settings()
        if self.crop_px is None or settings.heights_p > 0:
            return rows, cols
        turned = math.sqrt(2) if settings.rotate_p > 0 else 1.0
        zoomed = min(settings.zoom_min, 1.0) if settings.zoom_p > 0 else 1.0
        most = math.ceil(self.crop_px * turned / zoomed) + 2 * MARGIN_PX + 1
        return min(rows, most), min(cols, most)


def transform_of(recipe: AugmentRecipe, crop_px: int | None) -> Augmenter | Deferrer:
    """What the loader's workers do to a sample under this recipe."""
    return Deferrer(recipe, crop_px) if recipe.where == "device" else Augmenter(recipe, crop_px)
