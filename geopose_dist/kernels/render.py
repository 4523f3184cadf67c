"""Checked doors of the synthetic renderer's kernel, and the slow twin of its sight-line march.

A scene is a map of square cells: a height in metres and a number of the object that stands or lies there;
a table tells each object's colours and manner. The camera is affine: pixel (x, y) at height h above the
ground lies over the cell (col, row) = A (x, y, 1) + h * rise. Arrays are (row, column), C order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

import geopose_dist.kernels._render as _render
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
        """(col, row) of pixels at height h in metres; broadcasts."""
        (a, b, c), (d, e, f) = self.cell_from_pixel
        return a * x + b * y + c + h * self.rise[0], d * x + e * y + f + h * self.rise[1]


@dataclass(frozen=True)
class Terrain:
    """A height map with the block maxima that let rays skip what lies below them."""

    height: F32
    top: float = field(init=False)
    fine: F32 = field(init=False, repr=False)
    coarse: F32 = field(init=False, repr=False)

    def __post_init__(self) -> None:
        height = np.ascontiguousarray(self.height, np.float32)
        if height.ndim != 2 or height.size == 0:
            raise ValueError(f"height has shape {height.shape}; wanted [rows, cols] with at least one cell")
        if not (np.isfinite(height).all() and float(height.min()) >= 0):
            raise ValueError("height must be finite and >= 0 in every cell")
        object.__setattr__(self, "height", height)
        object.__setattr__(self, "fine", _block_max(height, FINE))
        object.__setattr__(self, "coarse", _block_max(self.fine, COARSE // FINE))
        object.__setattr__(self, "top", float(height.max()))

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
    padded = np.zeros((-(-rows // size) * size, -(-cols // size) * size), np.float32)
    padded[:rows, :cols] = values
    across = padded.reshape(padded.shape[0], -1, size).max(axis=2)
    return np.ascontiguousarray(across.reshape(-1, size, across.shape[1]).max(axis=1))


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
        terrain.height, terrain.fine, terrain.coarse, terrain.top, camera.packed(), agl, row, col, kind
    )
    return agl, row, col, kind


def trace_slow(terrain: Terrain, camera: AffineCamera, rows: int, cols: int, step_m: float = 0.02) -> F32:
    """Twin of `trace`: heights found by lowering all rays together in steps of `step_m`; right to within a step."""
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


def render(
    terrain: Terrain,
    ids: I32,
    objects: F32,
    gains: F32,
    around: F32,
    noise: F32,
    camera: AffineCamera,
    light: Light,
    cell_m: float,
    rows: int,
    cols: int,
) -> Picture:
    """The picture of a scene.

    `ids` [map] are rows of `objects` [n, 16]; `gains` [materials, 3] colour the materials (season);
    `around` [map / 4] is the mean height near a cell (m), which hides the sky; `noise` is a square
    periodic texture whose side is a power of two. Raises ValueError where these do not fit together.
    """
    terrain.check(camera, rows, cols)
    if ids.shape != terrain.height.shape:
        raise ValueError(f"ids have shape {ids.shape}, the map {terrain.height.shape}; they must agree")
    if objects.ndim != 2 or objects.shape[1] != OBJECT_COLUMNS:
        raise ValueError(f"objects have shape {objects.shape}; wanted [n, {OBJECT_COLUMNS}]")
    if ids.min() < 0 or ids.max() >= len(objects):
        raise ValueError(f"ids run from {ids.min()} to {ids.max()} but there are {len(objects)} objects")
    if gains.ndim != 2 or gains.shape[1] != 3 or not 0 <= objects[:, 12].max() < len(gains):
        raise ValueError(f"gains have shape {gains.shape}; wanted one row of three per material")
    least = tuple(-(-side // AROUND) for side in ids.shape)
    if around.shape != least:
        raise ValueError(f"around has shape {around.shape}; wanted {least}")
    if noise.shape[0] != noise.shape[1] or noise.shape[0] & (noise.shape[0] - 1):
        raise ValueError(f"noise has shape {noise.shape}; wanted a square whose side is a power of two")
    radiance = np.empty((rows, cols, 3), np.float32)
    agl, row, col = (np.empty((rows, cols), np.float32) for _ in range(3))
    seen = np.empty((rows, cols), np.int32)
    kind, lit = (np.empty((rows, cols), np.uint8) for _ in range(2))
    numbers = np.array(
        [*light.to_sun, *light.run(cell_m), light.disc_rad / light.to_sun[2], *light.sun_rgb, *light.sky_rgb],
        np.float32,
    )
    _render.render(
        terrain.height,
        terrain.fine,
        terrain.coarse,
        terrain.top,
        cell_m,
        np.ascontiguousarray(ids, np.int32),
        np.ascontiguousarray(objects, np.float32),
        np.ascontiguousarray(gains, np.float32),
        np.ascontiguousarray(around, np.float32),
        np.ascontiguousarray(noise, np.float32),
        camera.packed(),
        numbers,
        radiance,
        agl,
        row,
        col,
        seen,
        kind,
        lit,
    )
    return Picture(radiance, agl, row, col, seen, kind, lit)
