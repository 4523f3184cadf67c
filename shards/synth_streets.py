"""What all four cities share: the street grid, its markings and cars, trees, water, and things on roofs.

Each block has its own generator, keyed by (seed, place, block), so what stands in the middle of a place does
not depend on how much ground the tiles cover.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shards.synth_city import (
    DECIDUOUS,
    EVERGREEN,
    GRASS,
    MINERAL,
    ROOF,
    SOIL,
    WATER,
    Frame,
    Plan,
    Rgb,
    rectangle,
)

Box = tuple[float, float, float, float]

CAR_COLOURS: tuple[Rgb, ...] = (
    (235, 235, 235), (225, 226, 228), (190, 192, 195), (128, 130, 134), (60, 62, 66), (38, 39, 42), (150, 40, 36),
    (46, 66, 112), (178, 170, 150),
)  # fmt: skip


def jittered(rgb: Rgb, rng: np.random.Generator, amount: float = 10.0) -> Rgb:
    """A colour near another: brightness moves more than hue, in steps of 4 so that the object table stays short."""
    shift = rng.normal(0, amount)
    r, g, b = (float(min(max(4 * round((v + shift + rng.normal(0, amount / 4)) / 4), 8), 250)) for v in rgb)
    return r, g, b


@dataclass
class Site:
    """A place under construction: the plan, its street frame, and the looks that its blocks share."""

    plan: Plan
    frame: Frame
    rng: np.random.Generator
    greenness: float = 0.0

    def __post_init__(self) -> None:
        plan, rng = self.plan, self.rng
        grey = float(rng.uniform(84, 118))
        self.asphalt = plan.thing(
            (grey, grey, grey + 2), grain=0.05, patch=0.10
        )  # the plan's first: number 0
        self.lot = plan.thing(jittered((122, 122, 120), rng), grain=0.05, patch=0.12)
        self.pavement = plan.thing(jittered((168, 164, 155), rng), grain=0.05, patch=0.08)
        self.paint = plan.thing((222, 222, 216), grain=0.05, patch=0.05)
        self.grass = plan.thing(jittered((104, 116, 74), rng), grain=0.10, patch=0.20, material=GRASS)
        self.lawn = plan.thing(jittered((92, 112, 66), rng), grain=0.08, patch=0.14, material=GRASS)
        self.dry = plan.thing(jittered((146, 136, 98), rng), grain=0.10, patch=0.18, material=GRASS)
        self.soil = plan.thing(jittered((166, 146, 118), rng), grain=0.08, patch=0.16, material=SOIL)
        self.water = plan.thing(jittered((46, 62, 62), rng, 5), grain=0.02, patch=0.05, material=WATER)
        self.pool = plan.thing((92, 178, 196), grain=0.03, patch=0.02, material=MINERAL)
        self.crowns = [
            plan.thing(jittered((88, 103, 60), rng, 12), grain=0.20, patch=0.14, material=DECIDUOUS)
            for _ in range(5)
        ] + [
            plan.thing(jittered((64, 82, 55), rng, 8), grain=0.18, patch=0.10, material=EVERGREEN)
            for _ in range(3)
        ]
        self.cars = [
            plan.thing((r, g, b), wall=(0.7 * r, 0.7 * g, 0.7 * b), grain=0.02, patch=0.0)
            for r, g, b in CAR_COLOURS
        ]
        self.screen = plan.thing((44, 50, 58), grain=0.02, patch=0.0)
        self.unit = plan.thing((172, 174, 174), grain=0.04, patch=0.0, material=ROOF)
        plan.soil = self.soil
        self.unit_dark = plan.thing((104, 106, 108), grain=0.04, patch=0.0, material=ROOF)

    def ground(self, box: Box, thing: int) -> None:
        """Lay a rectangle of the frame on the ground."""
        self.plan.paint(self.frame.outline(*box), thing)

    def tree(
        self, x: float, y: float, rng: np.random.Generator, tall: float, evergreen: float = 0.25
    ) -> None:
        """A tree at a world position, if the ground is open there; `tall` is its usual height."""
        height = min(max(float(rng.normal(tall, 0.25 * tall)), 2.0), 28.0)
        radius = min(max(height * float(rng.uniform(0.26, 0.46)), 1.0), 7.0)
        first = 5 if rng.random() < evergreen else 0
        thing = self.crowns[first + int(rng.integers(3 if first else 5))]
        kind = int(rng.integers(8))
        # All draws come before this look at the map: beyond its edge nothing is drawn, and no draw may depend on that.
        if self.plan.material_at(x, y) in (GRASS, SOIL, MINERAL):
            self.plan.tree(x, y, radius, height, thing, kind)

    def trees(
        self, box: Box, count: float, rng: np.random.Generator, tall: float, evergreen: float = 0.25
    ) -> None:
        """About `count` trees anywhere open in a rectangle of the frame."""
        for _ in range(int(rng.poisson(max(count, 0)))):
            x, y = self.frame.world(float(rng.uniform(box[0], box[2])), float(rng.uniform(box[1], box[3])))
            self.tree(x, y, rng, tall, evergreen)

    def car(self, x: float, y: float, turn: float, rng: np.random.Generator) -> None:
        """A car of one of the usual colours; a few are vans."""
        van = rng.random() < 0.12
        a, b, high = (2.7, 1.05, 2.3) if van else (2.25, 0.92, 1.0)
        body = self.cars[min(int(rng.exponential(3.2)), len(self.cars) - 1)]
        if self.plan.material_at(x, y) != MINERAL:
            return
        self.plan.box(x, y, a, b, turn, high, body)
        if not van:
            self.plan.box(
                x - 0.2 * math.cos(turn), y - 0.2 * math.sin(turn), 1.35, 0.82, turn, 1.45, self.screen
            )
            self.plan.box(x - 0.25 * math.cos(turn), y - 0.25 * math.sin(turn), 0.8, 0.8, turn, 1.5, body)

    def car_park(self, box: Box, rng: np.random.Generator, full: float) -> None:
        """A paved lot with rows of stalls, a share `full` of them taken."""
        x0, y0, x1, y1 = box
        self.ground(box, self.lot)
        y = y0 + 3.0
        while y + 2.6 < y1:
            x = x0 + 2.0
            self.plan.line(
                [self.frame.world(x0 + 2, y + 2.6), self.frame.world(x1 - 2, y + 2.6)], self.paint, 0.15
            )
            while x + 2.8 < x1:
                a, b = self.frame.world(x, y - 2.5), self.frame.world(x, y + 2.5)
                self.plan.line([a, b], self.paint, 0.12)
                if rng.random() < full:
                    cx, cy = self.frame.world(x + 1.4, y)
                    self.car(cx, cy, self.frame.angle(x, y) + math.pi / 2, rng)
                x += 2.8
            y += 5.3 if rng.random() < 0.5 else 11.5
        self.trees(box, 0.0008 * (x1 - x0) * (y1 - y0), rng, 6.0)

    def roof_things(
        self, x: float, y: float, a: float, b: float, turn: float, top: float, rng: np.random.Generator
    ) -> None:
        """Plant, stair heads and skylights on a flat roof."""
        cos, sin = math.cos(turn), math.sin(turn)
        for _ in range(int(rng.poisson(min(14.0, a * b / 45)))):
            u, v = rng.uniform(-0.8, 0.8) * (a - 1.5), rng.uniform(-0.8, 0.8) * (b - 1.5)
            size = float(rng.uniform(0.6, 1.7))
            thing = self.unit if rng.random() < 0.6 else self.unit_dark
            self.plan.box(
                x + u * cos - v * sin,
                y + u * sin + v * cos,
                size,
                size * rng.uniform(0.6, 1.2),
                turn,
                top + rng.uniform(0.6, 2.0),
                thing,
            )


def street_positions(pitch: float, reach: float, wobble: float, rng: np.random.Generator) -> dict[int, float]:
    """Centre lines of parallel streets that cover [-reach, reach], by number; wobble is a share of the pitch."""
    count = math.ceil(reach / pitch) + 1
    # Drawn outwards from the middle, so a larger reach only adds streets.
    draws = rng.uniform(-wobble, wobble, 4001)
    return {i: (i + draws[2 * abs(i) + (i < 0)]) * pitch for i in range(-count, count + 1)}


def blocks(
    site: Site, pitch: tuple[float, float], wobble: float, wide: int
) -> Iterator[tuple[int, int, Box]]:
    """Draw the streets of a grid and yield its blocks (column, row, rectangle in the frame), kerb to kerb.

    Every `wide`-th street is an avenue. The ground starts as asphalt, so streets are what blocks leave over.
    """
    plan, rng = site.plan, site.rng
    reach = plan.half_m * 1.45 + 2 * site.frame.bend_m + 1.6 * max(pitch)
    xs, ys = (street_positions(p, reach, wobble, rng) for p in pitch)

    def half(i: int) -> float:
        return 7.5 if i % wide == 0 else 4.6

    for lines, across in ((xs, True), (ys, False)):
        for i, at in lines.items():
            if i % wide == 0:
                _markings(site, at, reach, across)
    for i, j in ((i, j) for i in xs for j in ys if i + 1 in xs and j + 1 in ys):
        box = (xs[i] + half(i), ys[j] + half(j), xs[i + 1] - half(i + 1), ys[j + 1] - half(j + 1))
        if not plan.misses(site.frame.outline(*box)):
            yield i, j, box


def _markings(site: Site, at: float, reach: float, across: bool) -> None:
    """Centre line, dashes and kerb lines of an avenue."""
    step, position = 9.0, -reach
    while position < reach:
        for offset, length in ((0.0, 9.0), (-3.4, 3.0), (3.4, 3.0)):
            ends = [(at + offset, position), (at + offset, position + length)]
            points = [site.frame.world(*(end if across else end[::-1])) for end in ends]
            site.plan.line(points, site.paint, 0.15)
        position += step


def street_cars(site: Site, box: Box, rng: np.random.Generator, density: float) -> None:
    """Cars parked along the four kerbs of a block and some driving, `density` per slot."""
    x0, y0, x1, y1 = box
    for horizontal, at, low, high in (
        (1, y0 - 1.3, x0, x1),
        (1, y1 + 1.3, x0, x1),
        (0, x0 - 1.3, y0, y1),
        (0, x1 + 1.3, y0, y1),
    ):
        position = low + 8.0
        while position < high - 8:
            if rng.random() < density:
                lane = at + (0.0 if rng.random() < 0.85 else (2.4 if at > low else -2.4))
                u, v = (position, lane) if horizontal else (lane, position)
                x, y = site.frame.world(u, v)
                site.car(x, y, site.frame.angle(u, v) + (0 if horizontal else math.pi / 2), rng)
            position += 6.2


def street_trees(site: Site, box: Box, rng: np.random.Generator, share: float, tall: float) -> None:
    """A row of trees on each pavement of a block."""
    x0, y0, x1, y1 = box
    for horizontal, at, low, high in (
        (1, y0 + 1.2, x0, x1),
        (1, y1 - 1.2, x0, x1),
        (0, x0 + 1.2, y0, y1),
        (0, x1 - 1.2, y0, y1),
    ):
        position = low + 4.0
        while position < high - 4:
            if rng.random() < share:
                x, y = site.frame.world(*((position, at) if horizontal else (at, position)))
                site.tree(x, y, rng, tall, 0.1)
            position += 8.0 + float(rng.uniform(-1, 2))


def pond(site: Site, x: float, y: float, radius: float, rng: np.random.Generator) -> None:
    """A still water with a grassy rim at a world position."""
    turns = np.linspace(0, 2 * math.pi, 28, endpoint=False)
    phase = rng.uniform(0, 6, 2)
    wave = 1 + 0.22 * np.sin(2 * turns + phase[0]) + 0.12 * np.sin(3 * turns + phase[1])
    for size, thing in ((radius + 4, site.grass), (radius, site.water)):
        points = [
            (float(x + size * w * math.cos(t)), float(y + size * w * math.sin(t)))
            for t, w in zip(turns, wave, strict=True)
        ]
        site.plan.paint(points, thing)


def waterway(site: Site, box: Box, avenues: tuple[bool, bool], rng: np.random.Generator) -> None:
    """A stretch of river in place of a block; avenues at its left or right end cross it on bridges."""
    x0, y0, x1, y1 = box
    left, right = x0 - (0 if avenues[0] else 8), x1 + (0 if avenues[1] else 8)
    site.ground((left, y0, right, y1), site.grass)
    site.ground((left, y0 + 7, right, y1 - 7), site.soil)
    site.ground((left, y0 + 9, right, y1 - 9), site.water)
    for low in (y0, y1 - 7):
        site.trees((x0, low, x1, low + 7), 0.10 * (x1 - x0), rng, 8.0)


def playing_field(site: Site, x: float, y: float, rng: np.random.Generator) -> None:
    """A ball field, its infield of soil, or a marked pitch; (x, y) in the frame is its middle."""
    frame, turn = site.frame, site.frame.angle(x, y)
    if rng.random() < 0.5:
        arc = [
            (x - 24 + 62 * math.cos(t), y - 24 + 62 * math.sin(t)) for t in np.linspace(0, math.pi / 2, 14)
        ]
        site.plan.paint(
            [frame.world(x - 24, y - 24), *(frame.world(float(u), float(v)) for u, v in arc)], site.lawn
        )
        arc = [
            (x - 24 + 27 * math.cos(t), y - 24 + 27 * math.sin(t)) for t in np.linspace(0, math.pi / 2, 10)
        ]
        site.plan.paint(
            [frame.world(x - 24, y - 24), *(frame.world(float(u), float(v)) for u, v in arc)], site.soil
        )
        site.plan.paint(rectangle(*frame.world(x - 15, y - 15), 8, 8, turn), site.lawn)
        return
    site.plan.paint(rectangle(*frame.world(x, y), 30.0, 21.0, turn), site.lawn)
    ring = [frame.world(x + u, y + v) for u, v in ((-28, -19), (28, -19), (28, 19), (-28, 19), (-28, -19))]
    site.plan.line(ring, site.paint, 0.15)
    site.plan.line([frame.world(x, y - 19), frame.world(x, y + 19)], site.paint, 0.15)


__all__ = [
    "Box",
    "Site",
    "blocks",
    "jittered",
    "playing_field",
    "pond",
    "street_cars",
    "street_trees",
    "waterway",
]
