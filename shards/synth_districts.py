"""Blocks that look like the four cities, and the plan of a place made of them.

ARG: an old grid, party walls, patios, flat and tiled roofs. ATL: towers and car parks over leafy streets. JAX:
suburbs with pitched roofs, ponds, a shopping centre. OMA: warehouses, mid-rise blocks, small houses, few trees.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shards.synth_buildings import SHEETS, TILES, WALLS, flat_building, house, pick, shed, tower, yard
from shards.synth_camera import ground_reach_m
from shards.synth_city import (
    HOUSE,
    PUNCHED,
    RIBBON,
    ROOF,
    Frame,
    Plan,
    rectangle,
)
from shards.synth_relief import hills
from shards.synth_streets import (
    Box,
    Site,
    blocks,
    jittered,
    playing_field,
    pond,
    street_cars,
    street_trees,
    waterway,
)

Generator = np.random.Generator


@dataclass(frozen=True)
class Kind:
    """How a city is laid out: cell (m), tallest body (m), street pitch (m), grid wobble, avenues,
    bend (m), share of places with a river, relief: most metres above and below the mean."""

    cell_m: float
    tallest_m: float
    pitch: tuple[float, float]
    wobble: float
    wide: int
    bend_m: float
    river: float
    relief_m: float
    fill: Callable[[Site, Box, Generator], None]


def arg_block(site: Site, box: Box, rng: Generator) -> None:
    """Lots with a narrow front: a house on the street, a patio, a back building; some towers."""
    x0, y0, x1, y1 = box
    plan, frame = site.plan, site.frame
    site.ground(box, site.pavement)
    if rng.random() < 0.05:  # a plaza
        site.ground((x0 + 3, y0 + 3, x1 - 3, y1 - 3), site.lawn)
        plan.line([frame.world(x0, y0), frame.world(x1, y1)], site.pavement, 3.0)
        plan.line([frame.world(x1, y0), frame.world(x0, y1)], site.pavement, 3.0)
        site.trees(box, 70, rng, 9.0)
        return
    inner = (x0 + 3.2, y0 + 3.2, x1 - 3.2, y1 - 3.2)
    site.ground(inner, site.lot if rng.random() < 0.4 else site.soil)
    middle = (inner[1] + inner[3]) / 2 + float(rng.uniform(-8, 8))
    for row in (0, 1):
        x = inner[0]
        while x < inner[2] - 6:
            width = min(float(rng.uniform(8, 15)), inner[2] - x)
            if inner[2] - x - width < 6:
                width = inner[2] - x
            front, back = (inner[1], middle) if row == 0 else (inner[3], middle)
            _arg_lot(site, x, x + width, front, back, rng)
            x += width
    street_trees(site, box, rng, 0.75, 7.5)
    street_cars(site, box, rng, 0.5)


def _arg_lot(site: Site, x0: float, x1: float, front: float, back: float, rng: Generator) -> None:
    frame, depth, inward = site.frame, abs(back - front), 1 if back > front else -1
    turn = frame.angle((x0 + x1) / 2, front)

    def body(near: float, far: float, left: float, right: float, height: float) -> None:
        x, y = frame.world((left + right) / 2, front + inward * (near + far) / 2)
        with site.plan.building(x, y):
            shaped(x, y, (right - left) / 2, (far - near) / 2, height)

    def shaped(x: float, y: float, a: float, b: float, height: float) -> None:
        draw = rng.random()
        if height < 8 and draw < 0.30:
            looks = {
                "wall": pick(WALLS, rng),
                "style": HOUSE,
                "material": ROOF,
                "grain": 0.08,
                "patch": 0.10,
            }
            along = turn if a > b else turn + math.pi / 2
            roof = site.plan.thing(pick(TILES, rng), turn=along, rib=0.9, **looks)  # type: ignore[arg-type]
            site.plan.roofed(x, y, max(a, b), min(a, b), along, height - 0.8, 0.42, draw < 0.1, roof)
        elif height < 8 and draw < 0.48:
            metal = site.plan.thing(
                pick(SHEETS, rng), turn=turn, rib=1.1, material=ROOF, wall=pick(WALLS, rng), patch=0.2
            )
            site.plan.roofed(x, y, a, b, turn, height - 0.5, 0.1, False, metal)
        else:
            flat_building(site, x, y, a, b, turn, height, rng, PUNCHED if height > 8 else HOUSE)

    house_depth = min(float(rng.uniform(14, 30)), depth - 4)
    if rng.random() < 0.03 and x1 - x0 > 10:
        x, y = frame.world((x0 + x1) / 2, front + inward * 12)
        tower(site, x, y, (x1 - x0) / 2, 10, turn, min(max(float(rng.gamma(4, 8)), 18.0), 75.0), rng)
        return
    storeys = int(rng.choice([1, 2, 3, 4], p=[0.38, 0.42, 0.15, 0.05]))
    set_back = float(rng.uniform(2, 5)) if rng.random() < 0.3 else 0.0
    body(set_back, set_back + house_depth, x0, x1, 3.3 * storeys + float(rng.uniform(0.3, 1.1)))
    rest = depth - set_back - house_depth
    near = set_back + house_depth
    if rest > 5 and rng.random() < 0.55:
        ground = (x0 + 0.3, *sorted((front + inward * near, back)), x1 - 0.3)
        site.ground((ground[0], ground[1], ground[3], ground[2]), site.lawn)
    if rest > 9 and rng.random() < 0.85:
        deep = float(rng.uniform(3.5, min(9.0, rest - 4)))
        share = float(rng.uniform(0.5, 1.0))
        body(depth - deep, depth, x0, x0 + share * (x1 - x0), float(rng.uniform(3.0, 6.4)))
        rest -= deep
    if rest > 9 and x1 - x0 > 9 and rng.random() < 0.18:
        x, y = site.frame.world((x0 + x1) / 2, front + inward * (near + 4.5))
        site.plan.paint(rectangle(x, y, 2.0, 3.4, turn), site.pool)
    elif rest > 5:
        for _ in range(int(rng.poisson(0.9))):
            x, y = site.frame.world(
                float(rng.uniform(x0 + 1.5, x1 - 1.5)),
                front + inward * (near + float(rng.uniform(1, rest - 1))),
            )
            site.tree(x, y, rng, 6.0, 0.3)


def atl_block(site: Site, box: Box, rng: Generator) -> None:
    """Towers, offices, car parks; or a wooded residential block, by how central the place is."""
    x0, y0, x1, y1 = box
    w, h = x1 - x0, y1 - y0
    frame = site.frame
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    turn = frame.angle(cx, cy)
    draw = rng.random()
    downtown = 1 - site.greenness
    if draw > downtown:
        site.ground(box, site.lawn)
        for u in np.arange(x0 + 14, x1 - 10, 27.0):
            for v, side in ((y0 + 14, 1), (y1 - 14, -1)):
                x, y = frame.world(float(u + rng.uniform(-2, 2)), float(v + side * rng.uniform(-2, 3)))
                if rng.random() < 0.85:
                    house(
                        site,
                        x,
                        y,
                        float(rng.uniform(6, 9)),
                        float(rng.uniform(4.5, 6)),
                        turn,
                        rng,
                        int(rng.integers(1, 3)),
                    )
        site.trees(box, 0.0130 * w * h, rng, 16.0, 0.35)
        street_cars(site, box, rng, 0.10)
        return
    site.ground(box, site.pavement)
    nx, ny = max(1, round(w / 62)), max(1, round(h / 62))
    for i in range(nx):
        for j in range(ny):
            cell = (
                x0 + w * i / nx + 3,
                y0 + h * j / ny + 3,
                x0 + w * (i + 1) / nx - 3,
                y0 + h * (j + 1) / ny - 3,
            )
            _atl_lot(site, cell, turn, rng)
    street_trees(site, box, rng, 0.6, 8.0)
    street_cars(site, box, rng, 0.25)


def _atl_lot(site: Site, box: Box, turn: float, rng: Generator) -> None:
    x0, y0, x1, y1 = box
    x, y = site.frame.world((x0 + x1) / 2, (y0 + y1) / 2)
    a, b = (x1 - x0) / 2, (y1 - y0) / 2
    draw = rng.random()
    if draw < 0.27:
        height = min(max(float(rng.gamma(2.0, 20)) + 22, 26.0), 165.0)
        tower(site, x, y, a * rng.uniform(0.6, 0.95), b * rng.uniform(0.6, 0.95), turn, height, rng)
    elif draw < 0.58:
        flat_building(
            site, x, y, a * rng.uniform(0.6, 1), b * rng.uniform(0.6, 1), turn, float(rng.uniform(6, 26)), rng
        )
    elif draw < 0.67:  # a car park on floors: open facade, cars on the roof
        high = 3.1 * int(rng.integers(3, 7))
        deck = site.plan.thing(
            jittered((160, 158, 152), rng),
            turn=turn,
            style=RIBBON,
            floor=3.1,
            bay=8,
            glass=0.35,
            material=ROOF,
            patch=0.12,
        )
        with site.plan.building(x, y):
            site.plan.box(x, y, a * 0.9, b * 0.9, turn, high, deck)
    elif draw < 0.84:
        site.car_park(box, rng, float(rng.uniform(0.3, 0.9)))
    else:
        site.ground(box, site.lawn)
        site.trees(box, 0.009 * (x1 - x0) * (y1 - y0), rng, 13.0)


def jax_block(site: Site, box: Box, rng: Generator) -> None:
    """Two rows of detached houses with lawns and pools; a pond, a wood, or a shopping centre instead."""
    x0, y0, x1, y1 = box
    w, h = x1 - x0, y1 - y0
    frame = site.frame
    draw = rng.random()
    if draw < 0.07:
        site.ground(box, site.grass)
        x, y = frame.world((x0 + x1) / 2, (y0 + y1) / 2)
        pond(site, x, y, float(0.36 * min(w, h)), rng)
        site.trees(box, 0.002 * w * h, rng, 9.0)
        return
    if draw < 0.16:
        site.ground(box, site.grass)
        if rng.random() < 0.25:
            playing_field(site, (x0 + x1) / 2, (y0 + y1) / 2, rng)
            return
        site.trees(box, 0.016 * w * h, rng, 13.0, 0.55)
        return
    if draw < 0.27:
        deep = h * 0.45
        site.car_park((x0, y0 + deep + 3, x1, y1), rng, float(rng.uniform(0.2, 0.7)))
        site.ground((x0, y0, x1, y0 + deep + 3), site.pavement)
        x, y = frame.world((x0 + x1) / 2, y0 + deep / 2 + 1)
        shed(
            site, x, y, 0.44 * w, deep / 2 - 2, frame.angle((x0 + x1) / 2, y0), float(rng.uniform(6, 10)), rng
        )
        return
    site.ground(box, site.lawn if rng.random() < 0.7 else site.grass)
    lots = max(1, round(w / float(rng.uniform(19, 24))))
    for k in range(lots):
        for front, inward in ((y0, 1), (y1, -1)):
            u = x0 + w * (k + 0.5) / lots
            x, y = frame.world(u, front + inward * (11 + float(rng.uniform(0, 4))))
            turn = frame.angle(u, front)
            if rng.random() < 0.06:
                continue
            drive = frame.outline(
                u + 3.5, min(front, front + inward * 9), u + 8.0, max(front, front + inward * 9)
            )
            site.plan.paint(drive, site.pavement)
            house(
                site,
                x,
                y,
                float(rng.uniform(6.5, 8.6)),
                float(rng.uniform(4.6, 6.2)),
                turn,
                rng,
                2 if rng.random() < 0.22 else 1,
            )
            px, py = frame.world(u + float(rng.uniform(-4, 4)), front + inward * 23)
            if rng.random() < 0.22:
                site.plan.paint(rectangle(px, py, 4.4, 3.2, turn), site.pavement)
                site.plan.paint(rectangle(px, py, 3.2, 2.0, turn), site.pool)
            if rng.random() < 0.3:
                cx, cy = frame.world(u + 5.7, front + inward * 3.5)
                site.car(cx, cy, turn + math.pi / 2, rng)
    site.trees(box, (0.0085 + 0.015 * site.greenness) * w * h, rng, 12.0, 0.4)
    street_cars(site, box, rng, 0.05)


def oma_block(site: Site, box: Box, rng: Generator) -> None:
    """Halls with yards, mid-rise blocks with car parks, small houses, or open ground."""
    x0, y0, x1, y1 = box
    w, h = x1 - x0, y1 - y0
    frame = site.frame
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    turn = frame.angle(cx, cy)
    draw = rng.random()
    if draw < 0.30:
        site.ground(box, site.lot)
        split = float(rng.uniform(0.4, 0.6))
        for left, right in ((0.0, split), (split, 1.0)):
            if rng.random() < 0.7:
                x, y = frame.world(x0 + w * (left + right) / 2, cy + float(rng.uniform(-0.1, 0.1)) * h)
                a, b = (
                    w * (right - left) / 2 * float(rng.uniform(0.6, 0.85)),
                    h / 2 * float(rng.uniform(0.4, 0.75)),
                )
                shed(site, x, y, a, b, turn, float(rng.uniform(5.5, 12)), rng)
        yard(site, box, turn, rng)
        site.trees(box, 0.0006 * w * h, rng, 7.0)
        street_cars(site, box, rng, 0.1)
    elif draw < 0.50:
        site.ground(box, site.pavement)
        site.car_park((x0 + 3, cy + 2, x1 - 3, y1 - 3), rng, float(rng.uniform(0.2, 0.8)))
        x, y = frame.world(cx, (y0 + cy) / 2)
        style = int(rng.choice([PUNCHED, RIBBON]))
        flat_building(
            site,
            x,
            y,
            0.40 * w,
            h * 0.15,
            turn,
            3.4 * (int(rng.integers(2, 7)) + int(rng.exponential(1.2)) % 7),
            rng,
            style,
        )
        street_trees(site, box, rng, 0.3, 6.5)
        street_cars(site, box, rng, 0.2)
    elif draw < 0.82:
        site.ground(box, site.grass if rng.random() < 0.6 else site.lawn)
        lots = max(1, round(w / 17))
        for k in range(lots):
            for front, inward in ((y0, 1), (y1, -1)):
                u = x0 + w * (k + 0.5) / lots
                if rng.random() < 0.88:
                    x, y = frame.world(u, front + inward * (12 + float(rng.uniform(-1, 2))))
                    house(
                        site,
                        x,
                        y,
                        float(rng.uniform(5, 7.5)),
                        float(rng.uniform(3.8, 5)),
                        turn,
                        rng,
                        2 if rng.random() < 0.35 else 1,
                    )
                if rng.random() < 0.5:
                    x, y = frame.world(u + 4, front + inward * 27)
                    house(site, x, y, 3.4, 3.0, turn, rng)
        site.trees(box, 0.0065 * w * h, rng, 10.5)
        street_cars(site, box, rng, 0.12)
    elif draw < 0.91:
        site.car_park(box, rng, float(rng.uniform(0.1, 0.6)))
    else:
        site.ground(box, site.dry if rng.random() < 0.5 else site.grass)
        if rng.random() < 0.6:
            playing_field(site, cx, cy, rng)
        site.trees(box, 0.0015 * w * h, rng, 9.0)


KINDS = {
    "ARG": Kind(0.26, 96.0, (112.0, 96.0), 0.06, 5, 0.0, 0.10, 2.0, arg_block),
    "ATL": Kind(0.38, 196.0, (128.0, 112.0), 0.12, 3, 0.0, 0.0, 16.0, atl_block),
    "JAX": Kind(0.26, 40.0, (170.0, 74.0), 0.10, 4, 22.0, 0.30, 3.0, jax_block),
    "OMA": Kind(0.26, 60.0, (150.0, 104.0), 0.10, 3, 0.0, 0.12, 18.0, oma_block),
}


def build(city: str, size: int, seed: int, place: int, *, relief: float = 0.0, owners: bool = False) -> Plan:
    """The ground plan of a place, large enough for every view of tiles of `size` pixels.

    `relief` multiplies the city's own hills; with `owners`, every cell knows its building.
    """
    kind = KINDS[city]
    rng = keyed(seed, place, 1)
    turn, phase = float(rng.uniform(-0.6, 0.6)), float(rng.uniform(0, 6.28))
    greenness = float(rng.uniform(0.15, 0.75))
    shift = (float(rng.uniform(-1.5, 1.5)) * min(kind.pitch), float(rng.uniform(-1.5, 1.5)) * min(kind.pitch))
    height_m = relief * kind.relief_m
    plan = Plan(ground_reach_m(city, size, kind.tallest_m + 2 * height_m), kind.cell_m, owners=owners)
    if relief > 0:
        plan.raise_ground(hills(plan.side, plan.cell, height_m, keyed(seed, place, 7)))
    site = Site(plan, Frame(turn, kind.bend_m, phase=phase, shift=shift), rng, greenness)
    river = int(rng.integers(-1, 2)) if rng.random() < kind.river else None
    for i, j, box in blocks(site, kind.pitch, kind.wobble, kind.wide):
        if j == river:
            waterway(site, box, (i % kind.wide == 0, (i + 1) % kind.wide == 0), keyed(seed, place, 2, i, j))
        else:
            kind.fill(site, box, keyed(seed, place, 2, i, j))
    plan.finish()
    tallest = float((plan.height if plan.ground is None else plan.height - plan.ground).max())
    assert tallest <= kind.tallest_m + 2 * height_m, f"{city} place {place} is {tallest} m tall"
    return plan


def keyed(*numbers: int) -> Generator:
    """The generator of a key: (seed, place, stage, ...); the same on every machine and in every process."""
    return np.random.Generator(
        np.random.Philox(np.random.SeedSequence([number & 0xFFFFFFFF for number in numbers]))
    )
