"""Checked doors of the synthetic renderer's kernels, and the slow twins of its marches.

A scene is a map of square cells: the surface's height in metres, the bare ground's below it, and a number of the
object that stands or lies there; a table tells each object's colours and manner. The camera is affine: pixel
(x, y) at height h above the map's zero lies over the cell (col, row) = A (x, y, 1) + h * rise. Heights in labels
are above the bare ground of the cell that is seen. Arrays are (row, column), C order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt

import geopose_dist.kernels._render as _render
import geopose_dist.kernels._sun as _sun
import geopose_dist.kernels._trace as _trace

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]

OBJECT_COLUMNS = 16
"""red green blue, wall red green blue, cosine sine, floor_m, bay_m, grain, patch, material, style, glass, rib_m."""
FINE, COARSE, AROUND = 8, 64, 4
TOP, WALL = 0, 1


@dataclass(frozen=True)
class AffineCamera:
    """Where a pixel's line of sight runs over the cells.

    Attributes:
        cell_from_pixel: [2, 3]: (col, row) of pixel (x, y) at height 0 = cell_from_pixel @ (x, y, 1).
        rise: (col, row) by which the line of sight moves per metre of height.
    """

    cell_from_pixel: F64
    rise: tuple[float, float]

    def packed(self) -> F64:
        """The eight numbers in the kernel's order."""
        return np.array([*np.asarray(self.cell_from_pixel, np.float64).ravel(), *self.rise], np.float64)

    def cells(self, x: F64, y: F64, h: F64 | float) -> tuple[F64, F64]:
        """(col, row) of pixels at height h above the map's zero, in metres; broadcasts."""
        (a, b, c), (d, e, f) = self.cell_from_pixel
        return a * x + b * y + c + h * self.rise[0], d * x + e * y + f + h * self.rise[1]


@dataclass(frozen=True)
class Terrain:
    """A height map with the block maxima that let rays skip what lies below them.

    Attributes:
        height: of the surface above the map's zero, [rows, cols] in metres.
        ground: of the bare ground, nowhere above the surface; None where it is zero everywhere.
    """

    height: F32
    ground: F32 | None = None
    top: float = field(init=False)
    fine: F32 = field(init=False, repr=False)
    coarse: F32 = field(init=False, repr=False)
    _turned: F32 | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        height = np.ascontiguousarray(self.height, np.float32)
        if height.ndim != 2 or height.size == 0:
            raise ValueError(f"height has shape {height.shape}; wanted [rows, cols] with at least one cell")
        if not (np.isfinite(height).all() and float(height.min()) >= 0):
            raise ValueError("height must be finite and >= 0 in every cell")
        if self.ground is not None:
            ground = np.ascontiguousarray(self.ground, np.float32)
            if ground.shape != height.shape or not (ground <= height).all():
                raise ValueError(
                    f"ground has shape {ground.shape}, the surface {height.shape}; they must agree, and no cell of "
                    "the ground may lie above the surface"
                )
            object.__setattr__(self, "ground", ground)
        object.__setattr__(self, "height", height)
        object.__setattr__(self, "fine", _block_max(height, FINE))
        object.__setattr__(self, "coarse", _block_max(self.fine, COARSE // FINE))
        object.__setattr__(self, "top", float(height.max()))

    def turned(self) -> F32:
        """The heights with rows and columns swapped, made once."""
        if self._turned is None:
            object.__setattr__(self, "_turned", np.ascontiguousarray(cv2.transpose(self.height)))
        assert self._turned is not None
        return self._turned

    def bare(self) -> F32:
        """The ground's heights as the kernels want them: without cells where it is zero everywhere."""
        return np.empty((0, 0), np.float32) if self.ground is None else self.ground

    def check(self, camera: AffineCamera, rows: int, cols: int) -> None:
        """Raise ValueError if a line of sight of the image would leave the map."""
        x = np.array([-1.0, cols, -1.0, cols])
        y = np.array([-1.0, -1.0, rows, rows])
        for h in (0.0, self.top):
            col, row = camera.cells(x, y, h)
            if (
                col.min() < 0
                or row.min() < 0
                or col.max() >= self.height.shape[1]
                or row.max() >= self.height.shape[0]
            ):
                raise ValueError(
                    f"the image of {rows} x {cols} pixels looks at rows {row.min():.0f}..{row.max():.0f}, columns "
                    f"{col.min():.0f}..{col.max():.0f} at height {h:g}, outside the map of {self.height.shape}"
                )


def _block_max(values: F32, size: int) -> F32:
    rows, cols = values.shape
    high, wide = -(-rows // size), -(-cols // size)
    if rows % size or cols % size:
        padded = np.zeros((high * size, wide * size), np.float32)
        padded[:rows, :cols] = values
        values = padded
    # Rows first: maxima of whole rows are what a machine does fast.
    down = values.reshape(high, size, wide * size).max(axis=1)
    return np.ascontiguousarray(down.reshape(high, wide, size).max(axis=2))


@dataclass(frozen=True)
class Light:
    """Sun and sky: `to_sun` is a unit vector (x right, y down, z up) in the map's axes; colours are linear."""

    to_sun: tuple[float, float, float]
    sun_rgb: tuple[float, float, float]
    sky_rgb: tuple[float, float, float]
    disc_rad: float = 0.0093
    """Apparent diameter of the sun, which softens the edges of long shadows."""

    def __post_init__(self) -> None:
        if self.to_sun[2] <= 0.05:
            raise ValueError(f"to_sun is {self.to_sun}; the sun must stand above the horizon (z > 0.05)")

    def run(self, cell_m: float) -> tuple[float, float]:
        """Cells (col, row) towards the sun per metre of climb."""
        x, y, z = self.to_sun
        return x / z / cell_m, y / z / cell_m

    def falls_m(self, cell_m: float) -> tuple[float, float]:
        """Metres that a shadow falls from cell to cell along rows or columns, from the disc's low and high end."""
        x, y, z = self.to_sun
        level = max(math.hypot(x, y), 1e-9)
        height = math.atan2(z, level)
        share = max(abs(x), abs(y)) / level
        low, high = (
            cell_m * math.tan(min(height + side * self.disc_rad / 2, 1.57)) / share for side in (-1, 1)
        )
        return low, high


@dataclass(frozen=True)
class Picture:
    """What a camera sees, each [H, W]: radiance [H, W, 3] float32, heights in m, cells of the surface, its
    object, TOP or WALL, and 1 where the sun shines on it."""

    radiance: F32
    agl_m: F32
    row: F32
    col: F32
    seen: I32
    kind: U8
    lit: U8


def trace(terrain: Terrain, camera: AffineCamera, rows: int, cols: int) -> tuple[F32, F32, F32, U8]:
    """(agl_m, row, col, kind) of the surface that each of rows x cols pixel centres sees; kind is TOP or WALL."""
    terrain.check(camera, rows, cols)
    agl, row, col = (np.empty((rows, cols), np.float32) for _ in range(3))
    kind = np.empty((rows, cols), np.uint8)
    _trace.trace(
        *(terrain.height, terrain.bare(), terrain.fine, terrain.coarse, terrain.top),
        *(camera.packed(), agl, row, col, kind),
    )
    return agl, row, col, kind


def trace_slow(terrain: Terrain, camera: AffineCamera, rows: int, cols: int, step_m: float = 0.02) -> F32:
    """Twin of `trace`: heights found by lowering all rays together in steps of `step_m`; right to within a step.

    Heights are above the map's zero: of a scene with relief, give it a terrain without a ground.
    """
    terrain.check(camera, rows, cols)
    y, x = np.mgrid[0:rows, 0:cols].astype(np.float64)
    agl = np.zeros((rows, cols), np.float32)
    found = np.zeros((rows, cols), bool)
    for h in np.arange(terrain.top, 0, -step_m):
        col, row = camera.cells(x, y, h)
        hit = ~found & (terrain.height[np.floor(row).astype(int), np.floor(col).astype(int)] >= h)
        agl[hit] = h
        found |= hit
    return agl


def shadow(terrain: Terrain, light: Light, cell_m: float, lift_m: float = 0.0) -> U8:
    """1 where the sun is seen from `lift_m` above the middle of a cell, else 0; shape of the map."""
    lit = np.empty(terrain.height.shape, np.uint8)
    run = light.run(cell_m)
    _trace.shadow(terrain.height, terrain.fine, terrain.coarse, terrain.top, *run, lift_m, lit)
    return lit


def shadow_heights(terrain: Terrain, light: Light, cell_m: float, memory: F32 | None = None) -> F32:
    """[rows, cols, 2]: the height above which the whole sun is seen from a cell, and above which some of it is.

    Where the sun stands more over columns than over rows, the result is a turned view of [cols, rows, 2]. `memory`,
    of at least as many floats, is used for it if given: fresh pages cost more than the shadows.
    """
    x, y, _ = light.to_sun
    by_row = abs(y) >= abs(x)
    height = terrain.height if by_row else terrain.turned()
    flat = np.empty(2 * height.size, np.float32) if memory is None else memory[: 2 * height.size]
    out = flat.reshape(*height.shape, 2)
    if x == y == 0:
        out[:] = -1e6
    else:
        far, side = (y, x) if by_row else (x, y)
        _sun.shadows(height, side / far, 1 if far > 0 else -1, *light.falls_m(cell_m), out)
    return out if by_row else out.transpose(1, 0, 2)


def shadow_heights_slow(terrain: Terrain, light: Light, cell_m: float) -> F32:
    """Twin of `shadow_heights`: each cell looks along its own line of cells to the sun."""
    rows, cols = terrain.height.shape
    x, y, _ = light.to_sun
    by_row = abs(y) >= abs(x)
    step, along = (1 if (y if by_row else x) > 0 else -1), (x / y if by_row else y / x)
    out = np.full((rows, cols, 2), -1e6, np.float32)
    for row in range(rows):
        for col in range(cols):
            at = row if by_row else col
            for k in range(1, max(rows, cols)):
                side = math.floor((at + k * step) * along + 0.5) - math.floor(at * along + 0.5)
                r, c = (row + k * step, col + side) if by_row else (row + side, col + k * step)
                if not (0 <= r < rows and 0 <= c < cols):
                    break
                for which, fall in enumerate(light.falls_m(cell_m)):
                    out[row, col, which] = max(out[row, col, which], terrain.height[r, c] - k * fall)
    return out


@dataclass(frozen=True)
class Looks:
    """What a scene is painted with.

    Attributes:
        ids: [map] int32, rows of `objects`.
        objects: [n, 16] float32, see `OBJECT_COLUMNS`.
        gains: [materials, 3] float32, colours of the materials (season).
        near: [map / 4, 2] float32: mean height near a cell (m above the map's zero), which hides the sky, and a slow
            texture.
        noise: [side, side, 2] float32: two periodic textures; side is a power of two.
        shade: [map, 2] float32 of `shadow_heights`.
        light: sun and sky.
        cell_m: side of a cell.
    """

    ids: I32
    objects: F32
    gains: F32
    near: F32
    noise: F32
    shade: F32
    light: Light
    cell_m: float

    def __post_init__(self) -> None:
        ids, objects, gains, noise = self.ids, self.objects, self.gains, self.noise
        if objects.ndim != 2 or objects.shape[1] != OBJECT_COLUMNS:
            raise ValueError(f"objects have shape {objects.shape}; wanted [n, {OBJECT_COLUMNS}]")
        if ids.min() < 0 or ids.max() >= len(objects):
            raise ValueError(f"ids run from {ids.min()} to {ids.max()} but there are {len(objects)} objects")
        if gains.ndim != 2 or gains.shape[1] != 3 or not 0 <= objects[:, 12].max() < len(gains):
            raise ValueError(f"gains have shape {gains.shape}; wanted one row of three per material")
        least = (*(-(-side // AROUND) for side in ids.shape), 2)
        if self.near.shape != least:
            raise ValueError(f"near has shape {self.near.shape}; wanted {least}")
        if noise.ndim != 3 or noise.shape[0] != noise.shape[1] or noise.shape[0] & (noise.shape[0] - 1):
            raise ValueError(
                f"noise has shape {noise.shape}; wanted two squares whose side is a power of two"
            )
        if self.shade.shape != (*ids.shape, 2):
            raise ValueError(f"shade has shape {self.shade.shape}; wanted {(*ids.shape, 2)}")

    def packed(self) -> tuple[I32 | F32 | int, ...]:
        """The arrays as the kernels want them; of `shade`, its memory and the steps of a row and a column in it."""
        arrays = (self.objects, self.gains, self.near, self.noise)
        rows, cols = self.ids.shape
        turned = not self.shade.flags.c_contiguous
        shade = np.ascontiguousarray(self.shade.transpose(1, 0, 2) if turned else self.shade, np.float32)
        return (
            np.ascontiguousarray(self.ids, np.int32),
            *(np.ascontiguousarray(array, np.float32) for array in arrays),
            *(shade.reshape(-1), 2 if turned else 2 * cols, 2 * rows if turned else 2),
        )

    def numbers(self, tall_m: float, wide_m: float, rise: tuple[float, float] = (0.0, 0.0)) -> F32:
        """Light, the metres of a wall that a pixel shows upwards and along it, and the viewer's side."""
        light, lean = self.light, max(math.hypot(*rise), 1e-9)
        view = rise[0] / lean, rise[1] / lean
        soft = sum(light.falls_m(self.cell_m)) / 2
        return np.array(
            [*light.to_sun, soft, tall_m, wide_m, *light.sun_rgb, *light.sky_rgb, *view], np.float32
        )


def render(
    terrain: Terrain, looks: Looks, camera: AffineCamera, rows: int, cols: int, into: Picture | None = None
) -> Picture:
    """The picture of a scene; ValueError where its parts do not fit together.

    `into` is a picture of the same size that nobody needs any more: its memory is used again.
    """
    terrain.check(camera, rows, cols)
    if looks.ids.shape != terrain.height.shape:
        raise ValueError(f"ids have shape {looks.ids.shape}, the map {terrain.height.shape}; they must agree")
    if into is None or into.agl_m.shape != (rows, cols):
        into = blank_picture(rows, cols)
    linear = np.asarray(camera.cell_from_pixel)[:, :2] * looks.cell_m
    wide = math.sqrt(abs(float(np.linalg.det(linear))))
    # A pixel's step down the image of a wall, which leans by `rise`, is this much of the wall.
    lean = math.hypot(*camera.rise) * looks.cell_m
    tall = wide / lean if lean > 1e-6 else 1e6
    _render.render(
        *(terrain.height, terrain.bare(), terrain.fine, terrain.coarse, terrain.top, looks.cell_m),
        *looks.packed(),
        *(camera.packed(), looks.numbers(tall, wide, camera.rise)),
        *(into.radiance, into.agl_m, into.row, into.col, into.seen, into.kind, into.lit),
    )
    return into


def blank_picture(rows: int, cols: int) -> Picture:
    """Memory for a picture."""
    radiance = np.empty((rows, cols, 3), np.float32)
    agl, row, col = (np.empty((rows, cols), np.float32) for _ in range(3))
    kind, lit = (np.empty((rows, cols), np.uint8) for _ in range(2))
    return Picture(radiance, agl, row, col, np.empty((rows, cols), np.int32), kind, lit)


def paint(terrain: Terrain, looks: Looks, row: F32, col: F32) -> tuple[F32, F32]:
    """(radiance [H, W, 3], agl_m [H, W]) of the tops of the cells at (row, col), as if nothing stood before them."""
    if row.shape != col.shape or looks.ids.shape != terrain.height.shape:
        raise ValueError(f"row, col, ids, map have shapes {row.shape}, {col.shape}, {looks.ids.shape}, "
                         f"{terrain.height.shape}; the first two and the last two must agree")  # fmt: skip
    if not (
        row.min() >= 0 <= col.min() and row.max() < looks.ids.shape[0] and col.max() < looks.ids.shape[1]
    ):
        raise ValueError("row and col must lie on the map")
    radiance, agl = np.empty((*row.shape, 3), np.float32), np.empty(row.shape, np.float32)
    _render.paint(
        *(terrain.height, terrain.bare(), looks.cell_m),
        *looks.packed(),
        *(looks.numbers(1, 1), row, col, radiance, agl),
    )
    return radiance, agl


def visible(terrain: Terrain, camera: AffineCamera, row: F32, col: F32) -> U8:
    """1 where nothing stands between the camera and the top of the cell at (row, col), else 0."""
    seen = np.empty(row.shape, np.uint8)
    _trace.visible(
        *(terrain.height, terrain.fine, terrain.coarse, terrain.top, camera.packed(), row, col, seen)
    )
    return seen
