"""The ground plan of a synthetic place: a height map, a map of object numbers, and what each object looks like.

World coordinates are metres, x east, y south, the place's middle at (0, 0). Things are drawn in painter's order:
ground first, then buildings, then trees, which only ever raise the map. Every wall is vertical; a building stands
level on the height of the ground at its middle. The maps of the surface and of the bare ground are the truth that
labels are read from: what is above the ground is their difference, cell by cell.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from geopose_dist.kernels.render import AROUND, COARSE, OBJECT_COLUMNS, Terrain

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
Rgb = tuple[float, float, float]

# Materials: what a season does to a colour depends on them. The kernel knows the two kinds of crown by number.
MINERAL, GRASS, DECIDUOUS, EVERGREEN, WATER, ROOF, SOIL = range(7)
# Facade styles of the kernel.
BLANK, PUNCHED, RIBBON, CURTAIN, HOUSE = range(5)

MUTED = 0.68
SHIFT = 4  # cv2 draws with 1/16 cell


def linear(rgb: Rgb) -> Rgb:
    """Linear reflectance of a colour as a screen shows it (0..255), as muted as the air leaves it from orbit."""
    r, g, b = ((value / 255) ** 2.2 for value in rgb)
    grey = 0.3 * r + 0.55 * g + 0.15 * b
    return grey + MUTED * (r - grey), grey + MUTED * (g - grey), grey + MUTED * (b - grey)


@dataclass(frozen=True)
class Frame:
    """A street grid's own axes: turned by `turn_rad` and, in suburbs, gently bent."""

    turn_rad: float
    bend_m: float = 0.0
    wave_m: float = 400.0
    phase: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    """Where the frame's origin lies from the place's middle, so that no crossing is always in the picture's middle."""

    def world(self, x: float, y: float) -> tuple[float, float]:
        """World position of a point of the frame."""
        bx = x + self.bend_m * math.sin(2 * math.pi * y / self.wave_m + self.phase)
        by = y + self.bend_m * math.sin(2 * math.pi * x / (1.3 * self.wave_m) + 2 * self.phase)
        cos, sin = math.cos(self.turn_rad), math.sin(self.turn_rad)
        return cos * bx - sin * by + self.shift[0], sin * bx + cos * by + self.shift[1]

    def angle(self, x: float, y: float) -> float:
        """Direction of the frame's x axis at a point, in the world."""
        x0, y0 = self.world(x - 1, y)
        x1, y1 = self.world(x + 1, y)
        return math.atan2(y1 - y0, x1 - x0)

    def outline(self, x0: float, y0: float, x1: float, y1: float) -> list[tuple[float, float]]:
        """World polygon of a rectangle of the frame; its sides are cut so that they can bend."""
        corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
        pieces = 1 if self.bend_m == 0 else 8
        points = []
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
            points += [
                self.world(ax + (bx - ax) * k / pieces, ay + (by - ay) * k / pieces) for k in range(pieces)
            ]
        return points


class Plan:
    """The maps of one place, while they are being drawn and after.

    Attributes:
        height: float32 [rows, cols], the surface's metres above the map's zero, which is its lowest ground.
        ground: float32 [rows, cols], the bare ground's; None where it is flat.
        ids: int32 [rows, cols], rows of `objects`.
        owner: int32 [rows, cols], number of the building that is the surface there, 0 for none; None unless wanted.
        cell: side of a cell in metres.
        side: cells along an edge of the maps.
        soil: number of the object that shows where a building is gone.
    """

    def __init__(self, reach_m: float, cell_m: float, *, owners: bool = False) -> None:
        self.side = -(-math.ceil(2 * reach_m / cell_m) // COARSE) * COARSE
        self.cell = cell_m
        self.height: F32 = np.zeros((self.side, self.side), np.float32)
        self.ids: I32 = np.zeros((self.side, self.side), np.int32)
        self.ground: F32 | None = None
        self.owner: I32 | None = np.zeros((self.side, self.side), np.int32) if owners else None
        self.soil = 0
        self._things: list[tuple[float, ...]] = []
        self._named: dict[tuple[float, ...], int] = {}
        self._base: float | None = None
        self._buildings = 0
        self._number = 0

    def raise_ground(self, ground: F32) -> None:
        """Give the empty plan its relief: heights of the bare ground, float32 [rows, cols], of at least 0."""
        self.ground = ground
        self.height[:] = ground

    def ground_at(self, x: float, y: float) -> float:
        """Height of the bare ground at a point; outside, of the nearest cell."""
        if self.ground is None:
            return 0.0
        row, col = (min(max(value, 0), self.side - 1) for value in self._cell(x, y))
        return float(self.ground[row, col])

    @contextlib.contextmanager
    def building(self, x: float, y: float) -> Iterator[None]:
        """What is drawn inside belongs to one building with its middle at (x, y), and stands level."""
        if self._base is not None:  # a part of a building that was begun outside
            yield
            return
        self._buildings += 1
        self._base, self._number = self.ground_at(x, y), self._buildings
        try:
            yield
        finally:
            self._base, self._number = None, 0

    def finish(self) -> None:
        """After drawing: no level floor lies below the slope that it was cut into."""
        if self.ground is not None:
            np.maximum(self.height, self.ground, out=self.height)

    @property
    def half_m(self) -> float:
        """Metres from the middle to an edge."""
        return self.side * self.cell / 2

    def thing(
        self,
        rgb: Rgb,
        *,
        wall: Rgb | None = None,
        turn: float = 0.0,
        floor: float = 3.0,
        bay: float = 3.5,
        grain: float = 0.06,
        patch: float = 0.08,
        material: int = MINERAL,
        style: int = BLANK,
        glass: float = 1.0,
        rib: float = 0.0,
    ) -> int:
        """The number of an object with these looks (colours 0..255 as on a screen); equal looks share a number."""
        row = (
            *linear(rgb),
            *linear(wall or rgb),
            math.cos(turn),
            math.sin(turn),
            floor,
            bay,
            grain,
            patch,
            float(material),
            float(style),
            glass,
            rib,
        )
        if row not in self._named:
            self._named[row] = len(self._things)
            self._things.append(row)
        return self._named[row]

    def objects(self) -> F32:
        """The table of objects, float32 [n, 16]."""
        return np.array(self._things, np.float32).reshape(-1, OBJECT_COLUMNS)

    def material_at(self, x: float, y: float) -> int:
        """Material of the cell under a point; -1 outside the map or where something stands."""
        row, col = self._cell(x, y)
        if not (0 <= row < self.side and 0 <= col < self.side):
            return -1
        ground = 0.0 if self.ground is None else self.ground[row, col]
        if self.height[row, col] > ground + 1e-3:
            return -1
        return int(self._things[self.ids[row, col]][12])

    def _cell(self, x: float, y: float) -> tuple[int, int]:
        return math.floor(y / self.cell + self.side / 2), math.floor(x / self.cell + self.side / 2)

    def _fixed(self, points: Sequence[tuple[float, float]]) -> I32:
        """Points as cv2 wants them: (x, y) of cell centres in 1/16 cell."""
        cells = np.array(points, np.float64) / self.cell + self.side / 2 - 0.5
        return np.rint(cells * (1 << SHIFT)).astype(np.int32)

    def misses(self, points: Sequence[tuple[float, float]], margin_m: float = 0.0) -> bool:
        """Whether a polygon lies wholly outside the map."""
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        edge = self.half_m + margin_m
        return max(xs) < -edge or min(xs) > edge or max(ys) < -edge or min(ys) > edge

    def paint(self, points: Sequence[tuple[float, float]], thing: int) -> None:
        """Lay a flat polygon on the ground."""
        if not self.misses(points):
            cv2.fillPoly(self.ids, [self._fixed(points)], thing, shift=SHIFT)

    def line(self, points: Sequence[tuple[float, float]], thing: int, width_m: float) -> None:
        """Draw a line on the ground."""
        cells = max(1, round(width_m / self.cell))
        if not self.misses(points):
            cv2.polylines(self.ids, [self._fixed(points)], False, thing, thickness=cells, shift=SHIFT)

    def prism(self, points: Sequence[tuple[float, float]], height: float, thing: int) -> None:
        """Stand a flat-topped body on the ground, replacing what is there."""
        if not self.misses(points):
            fixed = [self._fixed(points)]
            base = self.ground_at(*points[0]) if self._base is None else self._base
            cv2.fillPoly(self.ids, fixed, thing, shift=SHIFT)
            cv2.fillPoly(self.height, fixed, base + height, shift=SHIFT)
            if self.owner is not None:
                cv2.fillPoly(self.owner, fixed, self._number, shift=SHIFT)

    def box(self, x: float, y: float, a: float, b: float, turn: float, height: float, thing: int) -> None:
        """A flat-topped box of half sides a, b turned by `turn`."""
        self.prism(rectangle(x, y, a, b, turn), height, thing)

    def roofed(
        self,
        x: float,
        y: float,
        a: float,
        b: float,
        turn: float,
        eave: float,
        pitch: float,
        hip: bool,
        thing: int,
    ) -> None:
        """A box with a pitched roof, its ridge along the first axis: gable, or hipped at the ends too."""
        cos, sin = math.cos(turn), math.sin(turn)
        reach = math.hypot(a, b)
        r0, c0 = (max(0, value) for value in self._cell(x - reach, y - reach))
        r1, c1 = (min(self.side, value + 1) for value in self._cell(x + reach, y + reach))
        if r0 >= r1 or c0 >= c1:
            return
        base = self.ground_at(x, y) if self._base is None else self._base
        dx = ((np.arange(c0, c1) + 0.5 - self.side / 2) * self.cell - x).astype(np.float32)
        dy = ((np.arange(r0, r1) + 0.5 - self.side / 2) * self.cell - y).astype(np.float32)[:, None]
        along = np.float32(a) - np.abs(dx * np.float32(cos) + dy * np.float32(sin))
        across = np.float32(b) - np.abs(dy * np.float32(cos) - dx * np.float32(sin))
        least = np.minimum(across, along)
        roof = np.float32(base + eave) + np.float32(pitch) * (least if hip else across)
        height = self.height[r0:r1, c0:c1]
        inside = (least >= 0) & (roof > height)  # where two wings meet, the upper roof shows
        np.copyto(height, roof, where=inside)
        np.copyto(self.ids[r0:r1, c0:c1], thing, where=inside)
        if self.owner is not None:
            np.copyto(self.owner[r0:r1, c0:c1], self._number, where=inside)

    def tree(self, x: float, y: float, radius: float, height: float, thing: int, kind: int) -> None:
        """A crown, from the templates made once per place; it only raises the map."""
        size = max(3, round(2 * radius / self.cell))
        template = crown_template(size, kind)
        row, col = self._cell(x - size * self.cell / 2, y - size * self.cell / 2)
        if row < 0 or col < 0 or row + size > self.side or col + size > self.side:
            return
        ground = self.height[row : row + size, col : col + size]
        crown = np.where(template > 0, template * np.float32(height) + np.float32(self.ground_at(x, y)), 0)
        higher = crown > ground
        np.copyto(ground, crown, where=higher)
        np.copyto(self.ids[row : row + size, col : col + size], thing, where=higher)
        if self.owner is not None:
            np.copyto(self.owner[row : row + size, col : col + size], 0, where=higher)

    def terrain(self) -> Terrain:
        """The height map with its block maxima."""
        return Terrain(self.height, self.ground)

    def around(self) -> F32:
        """Per 4 x 4 cells: the mean height around, which hides part of the sky (m), and slow patches of texture."""
        texture = noise_texture()[..., 0]
        small = cv2.resize(self.height, None, fx=1 / AROUND, fy=1 / AROUND, interpolation=cv2.INTER_AREA)
        width = max(3, round(9.0 / (AROUND * self.cell)) | 1)
        around = cv2.blur(small, (width, width))
        patches = np.zeros(small.shape, np.float32)
        for cells, corner in ((16.4, 0), (81.3, 37)):  # a point of the texture to so many cells
            count = math.ceil(self.side / cells) + 2
            points = texture[corner : corner + count, corner : corner + count]
            if len(points) < count:
                points = np.pad(points, (0, count - len(points)), mode="wrap")
            side = round(count * cells / AROUND)
            patches += cv2.resize(points, (side, side))[: len(small), : len(small)]
        return np.ascontiguousarray(np.stack([around, patches], axis=-1), np.float32)


@functools.cache
def noise_texture(side: int = 512) -> F32:
    """Two periodic textures side by side, [side, side, 2], of mean 0 and deviation 1: cell by cell a little smoother
    than white, and the same at 2.7 cells a point."""
    white = np.random.Generator(np.random.Philox(np.random.SeedSequence([20, 22]))).standard_normal(
        (side, side), np.float32
    )
    soft = white + 0.5 * (np.roll(white, 1, 0) + np.roll(white, 1, 1))
    soft = (soft - soft.mean()) / soft.std()
    points = round(side / 2.7)
    wrapped = np.pad(soft[:points, :points], (0, 2), mode="wrap")
    coarse = cv2.resize(wrapped, None, fx=side / points, fy=side / points)[:side, :side]
    return np.ascontiguousarray(np.stack([soft, coarse], axis=-1), np.float32)


_CROWNS: dict[tuple[int, int], F32] = {}


def crown_template(size: int, kind: int) -> F32:
    """Heights of a crown as a share of the tree's, float32 [size, size], 0 outside; `kind` picks one of eight."""
    key = (size, kind % 8)
    if key not in _CROWNS:
        rng = np.random.Generator(np.random.Philox(key=size * 8 + key[1]))
        axis = (np.arange(size) + 0.5) / size * 2 - 1
        radius = np.hypot(axis, axis[:, None])
        bearing = np.arctan2(axis[:, None], axis)
        lobes = (
            1
            + 0.10 * np.sin(3 * bearing + rng.uniform(0, 6))
            + 0.07 * np.sin(5 * bearing + rng.uniform(0, 6))
        )
        dome = np.sqrt(np.clip(1 - (radius / (0.88 * lobes)) ** 2, 0, 1))
        rough = cv2.resize(
            rng.uniform(-1, 1, (max(3, size // 4 + 1),) * 2), (size, size), interpolation=cv2.INTER_CUBIC
        )
        fine = rng.uniform(-1, 1, (size, size))
        crown = np.where(dome > 0, 0.42 + 0.50 * dome + 0.10 * rough + 0.035 * fine, 0)
        _CROWNS[key] = np.clip(crown, 0, 1).astype(np.float32)
    return _CROWNS[key]


def rectangle(x: float, y: float, a: float, b: float, turn: float) -> list[tuple[float, float]]:
    """Corners of a rectangle of half sides a, b turned by `turn`."""
    cos, sin = math.cos(turn), math.sin(turn)
    return [
        (x + i * a * cos - j * b * sin, y + i * a * sin + j * b * cos)
        for i, j in ((1, 1), (-1, 1), (-1, -1), (1, -1))
    ]
