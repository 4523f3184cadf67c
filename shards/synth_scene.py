"""A synthetic place that is ready to be looked at: its maps, what lies around each cell, and memory for its pictures.

The surface that the camera sees and the one that the lidar once measured are two maps, which differ where label
faults say that years passed between them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from geopose_dist.kernels import render
from geopose_dist.kernels.render import AffineCamera, Looks, Picture, Terrain
from shards import synth_districts, synth_look
from shards.synth_camera import Camera
from shards.synth_city import Plan
from shards.synth_districts import keyed
from shards.synth_faults import FaultRecipe
from shards.synth_look import Day, Holes

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]


@dataclass
class Scene:
    """One place.

    Attributes:
        city, size: of which city, for tiles of how many pixels.
        plan: the maps as the camera sees them.
        terrain: of the plan's surface.
        near: what lies around each cell, see `Looks`.
        holes: where the lidar has nothing.
        lidar: the surface when it was measured; `terrain` itself unless there are faults of date.
        faults: of the labels.
    """

    city: str
    size: int
    plan: Plan
    terrain: Terrain
    near: F32
    holes: Holes
    lidar: Terrain
    faults: FaultRecipe
    _shade: F32 | None = field(default=None, repr=False)
    _picture: Picture | None = field(default=None, repr=False)

    def affine(self, camera: Camera) -> AffineCamera:
        """The kernel's camera of a view."""
        level = self.plan.ground_at(0.0, 0.0)
        return camera.affine((self.size, self.size), self.plan.cell, self.plan.height.shape, level)

    def looks(self, day: Day) -> Looks:
        """The place as a day paints it; valid until the next call."""
        if self._shade is None:
            self._shade = np.empty(2 * self.plan.side**2, np.float32)
        return synth_look.looks_of(self.plan, self.terrain, self.near, day, self._shade)

    def picture(self, camera: Camera, looks: Looks) -> Picture:
        """Radiance and truth of a view; valid until the next call."""
        self._picture = render.render(
            self.terrain, looks, self.affine(camera), self.size, self.size, self._picture
        )
        return self._picture

    def label_cm(self, camera: Camera, picture: Picture, rng: np.random.Generator) -> U16:
        """Heights as a label file holds them: uint16 cm, 65535 unknown."""
        if self.lidar is not self.terrain:
            agl, row, col, kind = render.trace(self.lidar, self.affine(camera), self.size, self.size)
            picture = replace(picture, agl_m=agl, row=row, col=col, kind=kind)
        holes, faults = self.holes, self.faults
        gap = synth_look.wall_gaps(self.city) if faults.holes else 0.0
        if not faults.holes:
            holes = Holes(np.zeros_like(holes.mask), False)
        return synth_look.label_cm(picture, self.plan, holes, gap, faults.speckle, rng)

    def instances(self, row: F32, col: F32) -> U16:
        """Number of the building at cells, 0 for none, uint16."""
        assert self.plan.owner is not None
        return self.plan.owner[row.astype(np.intp), col.astype(np.intp)].astype(np.uint16)

    def truth(self, camera: Camera, looks: Looks) -> Ortho:
        """What stands on the ground that each pixel of a view would see if nothing stood on it."""
        bare = np.zeros_like(self.terrain.height) if self.terrain.ground is None else self.terrain.ground
        affine = self.affine(camera)
        _, row, col, _ = render.trace(Terrain(bare), affine, self.size, self.size)
        radiance, agl = render.paint(self.terrain, looks, row, col)
        seen = render.visible(self.terrain, affine, row, col)
        # What leans out of the picture is not seen in it either.
        y, x = np.mgrid[0 : self.size, 0 : self.size]
        dx, dy = (agl * camera.scale_px_per_m * part for part in camera.direction())
        inside = (x - dx >= 0) & (x - dx <= self.size - 1) & (y - dy >= 0) & (y - dy <= self.size - 1)
        return Ortho(radiance, agl, seen * inside.astype(np.uint8), self.instances(row, col))


@dataclass(frozen=True)
class Ortho:
    """A tile's ground seen from straight above, on the tile's own grid: what `geopose rectify` aims at.

    Attributes:
        radiance: [H, W, 3] float32 of the top of what stands there.
        agl_m: [H, W] its height above the ground.
        seen: [H, W] uint8, 1 where the camera sees that top within its picture.
        footprints: [H, W] uint16, number of the building that stands there, 0 for none.
    """

    radiance: F32
    agl_m: F32
    seen: U8
    footprints: U16


def build(
    city: str,
    size: int,
    seed: int,
    place: int,
    *,
    relief: float = 1.0,
    faults: FaultRecipe | None = None,
    owners: bool = False,
) -> Scene:
    """A place with everything that its views share; `owners` is needed for instances and for `truth`."""
    faults = faults or FaultRecipe()
    plan = synth_districts.build(city, size, seed, place, relief=relief, owners=owners or faults.date > 0)
    holes = synth_look.draw_holes(city, plan, size, keyed(seed, place, 4))
    measured = None
    if faults.date > 0:
        measured = pass_years(plan, faults.date, keyed(seed, place, 8))
    terrain = plan.terrain()
    near = plan.around()
    return Scene(city, size, plan, terrain, near, holes, measured or terrain, faults)


def pass_years(plan: Plan, share: float, rng: np.random.Generator) -> Terrain:
    """Take buildings off a plan, half of a share of them, and return the surface with them but without as many
    others: what the lidar met before the one were pulled down and the others built."""
    assert plan.owner is not None
    fate = rng.random(int(plan.owner.max()) + 1)
    fate[0] = 1.0  # what is no building stays
    gone, new = (fate < share / 2)[plan.owner], ((fate >= share / 2) & (fate < share))[plan.owner]
    ground = np.zeros_like(plan.height) if plan.ground is None else plan.ground
    before = np.where(new, ground, plan.height)
    np.copyto(plan.height, ground, where=gone)
    np.copyto(plan.ids, plan.soil, where=gone)
    np.copyto(plan.owner, 0, where=gone)
    return Terrain(before, plan.ground)
