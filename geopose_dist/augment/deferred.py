"""Augmentation left to the device: what a worker still does of it (`augment.where: device`).

Draw as ever, write the labels as they will be, cut the part of the tile that the output can show, raised heights
included, and put everything that is left to do into numbers (`data.deferred.Deferred`). No pixel is resampled
here. The device's half is model/device_augment.py.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from geopose_dist.augment.apply import Augmenter, _pose_after
from geopose_dist.augment.draw import Draw
from geopose_dist.augment.recipe import AugmentRecipe
from geopose_dist.augment.tone import noise_of, table
from geopose_dist.augment.window import SIGHT_PX, map_of, needed_window
from geopose_dist.data.deferred import Deferred, Raising, Toning
from geopose_dist.data.sample import View, Window
from geopose_dist.geometry import Pose


def defer(view: View, drawn: Draw) -> View:
    """The part of `view` that `drawn` needs, with the labels that it will have and what is left to do."""
    assert not drawn.faults, "AugmentRecipe refuses faithful on the device"
    assert view.inside is None, "tiles come whole from the reader"
    matrix, size = map_of(view.size, drawn)
    pose, raising, tallest_m = view.pose, None, 0.0
    if drawn.heights is not None and drawn.heights > 1:
        assert view.agl_m is not None, "draw() skips heights that are not known"
        assert pose is not None, "draw() skips heights without a pose"
        tallest_m = view.tallest_m
        per_m = pose.scale_px_per_m * (drawn.heights - 1)
        raising = Raising(per_m, pose.angle_rad, drawn.heights - 1, drawn.heights / per_m, tallest_m)
    need = needed_window(drawn, view.size, pose, tallest_m)
    first = (0, 0) if view.part is None else view.part.window[:2]
    part = Window(need.row - first[0], need.col - first[1], need.rows, need.cols).slices
    (a, b, c), (d, e, f) = matrix.tolist()
    toning = None
    if drawn.tone is not None:
        noise = noise_of(drawn.tone)
        toning = Toning(table(drawn.tone), noise if noise.any() else None, drawn.tone.noise_seed)
    after = _pose_after(pose or Pose(0.0, 1.0, view.gsd_m), drawn)
    return dataclasses.replace(
        view,
        rgb=view.rgb[part],
        agl_m=None if view.agl_m is None else view.agl_m[part],
        part=None,
        gsd_m=after.gsd_m,
        scale_px_per_m=None if pose is None else after.scale_px_per_m,
        angle_rad=None if pose is None else after.angle_rad,
        deferred=Deferred(size, ((a, b, c), (d, e, f)), need[2:], need[:2], view.size, raising, toning),
    )


@dataclass(frozen=True)
class Deferrer(Augmenter):
    """An `Augmenter` that leaves the pixels to the device: it draws, and notes what is left to do."""

    def apply(self, view: View, drawn: Draw) -> View:
        """See `defer`."""
        return defer(view, drawn)

    def ships_px(self, rows: int, cols: int) -> tuple[int, int]:
        """Rows and columns at most of what is shipped of a tile; raised heights may be met from anywhere in it."""
        settings = self.recipe.settings()
        if self.crop_px is None or settings.heights_p > 0:
            return rows, cols
        turned = math.sqrt(2) if settings.rotate_p > 0 else 1.0
        zoomed = min(settings.zoom_min, 1.0) if settings.zoom_p > 0 else 1.0
        most = math.ceil(self.crop_px * turned / zoomed) + 2 * SIGHT_PX + 1
        return min(rows, most), min(cols, most)


def transform_of(recipe: AugmentRecipe, crop_px: int | None) -> Augmenter:
    """What the loader's workers do to a sample under this recipe."""
    return Deferrer(recipe, crop_px) if recipe.where == "device" else Augmenter(recipe, crop_px)
