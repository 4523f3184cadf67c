"""Buildings of the synthetic cities: what flat blocks, towers, houses and halls are made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import ParamSpec

import numpy as np

from shards.synth_city import BLANK, CURTAIN, HOUSE, MINERAL, PUNCHED, RIBBON, ROOF, Rgb
from shards.synth_streets import Box, Site, jittered

Generator = np.random.Generator
P = ParamSpec("P")

WALLS: tuple[Rgb, ...] = (
    (206, 196, 178),
    (188, 172, 150),
    (170, 128, 104),
    (214, 212, 206),
    (152, 148, 142),
    (128, 96, 82),
)
FLAT_ROOFS: tuple[Rgb, ...] = (
    (198, 196, 190),
    (168, 166, 162),
    (226, 226, 222),
    (120, 120, 120),
    (92, 90, 90),
    (150, 140, 126),
)
SHINGLES: tuple[Rgb, ...] = (
    (118, 106, 96),
    (98, 94, 92),
    (138, 120, 102),
    (84, 80, 80),
    (150, 140, 128),
    (120, 84, 70),
)
TILES: tuple[Rgb, ...] = ((172, 104, 76), (156, 92, 68), (184, 122, 92))
SHEETS: tuple[Rgb, ...] = (
    (204, 206, 206),
    (180, 186, 190),
    (150, 156, 160),
    (214, 210, 200),
    (134, 146, 152),
)


CONTAINERS: tuple[Rgb, ...] = (
    (222, 222, 220),
    (206, 206, 202),
    (150, 82, 62),
    (86, 104, 130),
    (120, 122, 120),
)


def standing(draw: Callable[P, None]) -> Callable[P, None]:
    """Make what a function of (site, x, y, ...) draws one building, level, with a number of its own."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> None:
        site, x, y = args[:3]
        assert isinstance(site, Site)
        with site.plan.building(float(x), float(y)):  # type: ignore[arg-type]
            draw(*args, **kwargs)

    return drawn


def pick(colours: tuple[Rgb, ...], rng: Generator) -> Rgb:
    """One of the colours, a little off."""
    return jittered(colours[int(rng.integers(len(colours)))], rng, 8)


@standing
def flat_building(
    site: Site,
    x: float,
    y: float,
    a: float,
    b: float,
    turn: float,
    height: float,
    rng: Generator,
    style: int | None = None,
) -> None:
    """A flat-roofed body with a parapet and plant on top; its facade follows its height unless given."""
    if style is None:
        tall = height > 22
        style = int(
            rng.choice([CURTAIN, PUNCHED, RIBBON], p=[0.4, 0.35, 0.25] if tall else [0.08, 0.67, 0.25])
        )
    wall = pick(WALLS, rng)
    if style == CURTAIN:
        wall = jittered((120, 128, 134), rng, 16)
    floor, bay = float(rng.uniform(3.0, 4.0)), float(rng.uniform(2.8, 5.5))
    looks = {"wall": wall, "turn": turn, "floor": floor, "bay": bay, "style": style, "material": ROOF}
    glass = float(rng.uniform(0.5, 1.5))
    roof = pick(FLAT_ROOFS, rng)
    rim = site.plan.thing(jittered((200, 198, 192), rng), glass=glass, **looks)  # type: ignore[arg-type]
    flat = site.plan.thing(roof, glass=glass, grain=0.03, patch=0.18, **looks)  # type: ignore[arg-type]
    site.plan.box(x, y, a, b, turn, height, rim)
    if a > 2 and b > 2:
        site.plan.box(x, y, a - 0.45, b - 0.45, turn, max(height - 0.7, 0.5), flat)
        if min(a, b) > 5:
            site.roof_things(x, y, a - 1, b - 1, turn, height - 0.7, rng)


@standing
def tower(
    site: Site, x: float, y: float, a: float, b: float, turn: float, height: float, rng: Generator
) -> None:
    """A tall building, often set back once or twice and crowned by a plant room."""
    cos, sin = math.cos(turn), math.sin(turn)
    if rng.random() < 0.55 and min(a, b) > 11:
        flat_building(site, x, y, a, b, turn, float(rng.uniform(8, 20)), rng)
        a, b = a * float(rng.uniform(0.55, 0.8)), b * float(rng.uniform(0.55, 0.8))
        u, v = float(rng.uniform(-0.2, 0.2)) * a, float(rng.uniform(-0.2, 0.2)) * b
        x, y = x + u * cos - v * sin, y + u * sin + v * cos
    flat_building(site, x, y, a, b, turn, height, rng)
    if rng.random() < 0.4 and height > 50:
        flat_building(site, x, y, a * 0.7, b * 0.7, turn, height * 1.14, rng)
        a, b, height = a * 0.7, b * 0.7, height * 1.14
    site.plan.box(x, y, a * 0.4, b * 0.4, turn, height + 4.5, site.unit)


@standing
def house(
    site: Site, x: float, y: float, a: float, b: float, turn: float, rng: Generator, storeys: int = 1
) -> None:
    """A pitched-roofed house, one or two wings, of half sides a >= b."""
    if a < b:
        a, b, turn = b, a, turn + math.pi / 2
    roof = pick(SHINGLES if rng.random() < 0.85 else TILES, rng)
    looks = {
        "wall": pick(WALLS, rng),
        "floor": 2.9,
        "bay": 3.2,
        "style": HOUSE,
        "material": ROOF,
        "grain": 0.05,
        "patch": 0.09,
    }
    eave, pitch = 2.8 * storeys + 0.2, float(rng.uniform(0.38, 0.7))
    hip = rng.random() < 0.55
    thing = site.plan.thing(roof, turn=turn, rib=0.9, **looks)  # type: ignore[arg-type]
    site.plan.roofed(x, y, a, b, turn, eave, pitch, hip, thing)
    if rng.random() < 0.65:
        side = 1 if rng.random() < 0.5 else -1
        u, v = side * (a - b * 0.62), (1 if rng.random() < 0.5 else -1) * b * 0.75
        wx, wy = x + u * math.cos(turn) - v * math.sin(turn), y + u * math.sin(turn) + v * math.cos(turn)
        wing = site.plan.thing(roof, turn=turn + math.pi / 2, rib=0.9, **looks)  # type: ignore[arg-type]
        site.plan.roofed(wx, wy, b * 0.95, b * 0.6, turn + math.pi / 2, eave, pitch, hip, wing)


@standing
def shed(
    site: Site, x: float, y: float, a: float, b: float, turn: float, height: float, rng: Generator
) -> None:
    """A large hall: ribbed metal or membrane, flat or barely pitched, with skylights or plant."""
    if rng.random() < 0.5:
        looks = {"wall": pick(SHEETS, rng), "style": BLANK, "material": ROOF, "grain": 0.04, "patch": 0.10}
        thing = site.plan.thing(pick(SHEETS, rng), turn=turn, rib=2.4, **looks)  # type: ignore[arg-type]
        site.plan.roofed(x, y, a, b, turn, height, float(rng.uniform(0.04, 0.12)), False, thing)
        site.roof_things(x, y, a, b, turn, height + 0.05 * b, rng)
    else:
        flat_building(site, x, y, a, b, turn, height, rng, BLANK)


def yard(site: Site, box: Box, turn: float, rng: Generator) -> None:
    """What stands about on an industrial yard: rows of trailers and containers, a strip of grass, parked cars."""
    x0, y0, x1, y1 = box
    site.ground((x0, y0, x1, y0 + 5), site.grass)
    site.ground((x0, y0, x0 + 4, y1), site.grass)
    for _ in range(int(rng.integers(1, 4))):
        x, y = float(rng.uniform(x0 + 10, x1 - 40)), float(rng.uniform(y0 + 10, y1 - 16))
        for k in range(int(rng.integers(3, 11))):
            u, v = site.frame.world(x + 3.4 * k, y)
            taken, colour, height = (
                rng.random() < 0.75,
                pick(CONTAINERS, rng),
                3.9 if rng.random() < 0.7 else 2.6,
            )
            if taken and site.plan.material_at(u, v) == MINERAL:
                body = site.plan.thing(colour, turn=turn, grain=0.04, patch=0.05, rib=1.2)
                site.plan.box(u, v, 1.25, 6.1, turn, height, body)
    site.car_park((x0 + 8, y1 - 14, x0 + 8 + float(rng.uniform(20, 60)), y1 - 3), rng, 0.6)
