"""What a day and a sensor make of a place: sun, season, haze, colour cast, blur, noise, 8 bits; and label faults.

The sun's place in the sky is drawn apart from the camera's, so that no network can read one from the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from geopose_dist.kernels import sensor
from geopose_dist.kernels.render import Light, Looks, Picture, Terrain, render, shadow_heights
from shards.synth_camera import Camera
from shards.synth_city import DECIDUOUS, EVERGREEN, GRASS, SOIL, WATER, Plan, noise_texture

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

SUN_BEARING_DEG = {"ARG": 40.0, "ATL": 150.0, "JAX": 150.0, "OMA": 152.0}
"""Morning passes: the sun stands north-east in the southern hemisphere, south-east in the northern."""
NO_DATA_SHARE = {"ARG": 0.21, "ATL": 0.002, "JAX": 0.04, "OMA": 0.015}
"""Mean share of pixels without height, from the challenge's tiles (DOMAIN section 2)."""
MATERIALS = 7
HOLE_CELLS = 6
TONES = 4096
"""Steps of the curve from radiance to grey, from black to white."""


@dataclass(frozen=True)
class Day:
    """Light, season and air of one view."""

    light: Light
    gains: F32
    haze: float
    air: tuple[float, float, float]
    cast: tuple[float, float, float]
    blur_px: float
    noise: float
    gamma: float


def draw_day(city: str, rng: np.random.Generator) -> Day:
    """A morning of any season."""
    bearing = math.radians(SUN_BEARING_DEG.get(city, 150.0) + float(rng.uniform(-55, 55)))
    height = math.radians(float(rng.uniform(28, 68)))
    # Bearing is clockwise from north; the map has x east and y south.
    to_sun = (math.cos(height) * math.sin(bearing), -math.cos(height) * math.cos(bearing), math.sin(height))
    warm = float(rng.uniform(0.0, 0.10))
    season = float(rng.uniform(-1, 1))  # 1: lush, -1: bare
    gains = np.ones((MATERIALS, 3), np.float32)
    gains[GRASS] = np.array([1.12, 1.0, 0.95]) * (1.05 - 0.1 * season) + np.array(
        [-0.28, -0.02, -0.10]
    ) * max(season, 0)
    if season < 0:
        gains[GRASS] += np.array([0.40, 0.20, 0.22]) * -season
    bare = max(-season - 0.2, 0) / 0.8
    gains[DECIDUOUS] = np.array([1.0, 1.0, 1.0]) + np.array([0.75, 0.2, 0.75]) * bare
    gains[EVERGREEN] = 1 + 0.1 * float(rng.uniform(-1, 1))
    gains[SOIL] = 1 + 0.15 * float(rng.uniform(-1, 1))
    gains[WATER] = float(np.exp(rng.normal(0.1, 0.5)))  # sun glint and silt change from day to day
    sky = float(rng.uniform(0.20, 0.36))
    haze = float(rng.beta(1.6, 5)) * 0.45
    tint = rng.normal(0, 0.03, 3)
    return Day(
        light=Light(to_sun, (1.25, 1.22 - warm / 2, 1.15 - warm), (0.86 * sky, 0.97 * sky, 1.18 * sky)),
        gains=gains.astype(np.float32),
        haze=haze,
        air=(0.20, 0.23, 0.27),
        cast=(float(1 + tint[0]), float(1 + tint[1]), float(1 + tint[2])),
        blur_px=float(rng.uniform(0.48, 0.85)),
        noise=float(rng.uniform(0.8, 2.2)),
        gamma=float(rng.uniform(0.46, 0.56)),
    )


def looks_of(plan: Plan, terrain: Terrain, near: F32, day: Day, memory: F32 | None = None) -> Looks:
    """A place as a day paints it; its shadows are cast here, into `memory` if given."""
    shade = shadow_heights(terrain, day.light, plan.cell, memory)
    return Looks(plan.ids, plan.objects(), day.gains, near, noise_texture(), shade, day.light, plan.cell)


def take_picture(plan: Plan, terrain: Terrain, near: F32, camera: Camera, day: Day, size: int) -> Picture:
    """Radiance and truth of a view of `size` x `size` pixels."""
    affine = camera.affine((size, size), plan.cell, plan.height.shape, plan.ground_at(0.0, 0.0))
    return render(terrain, looks_of(plan, terrain, near, day), affine, size, size)


@dataclass(frozen=True)
class Stretch:
    """From radiance to grey: (radiance * gain + offset) by band is a place on the curve `tone`, rounded down."""

    gain: tuple[float, ...]
    offset: tuple[float, ...]
    tone: F32


def stretch_of(image: F32, day: Day) -> Stretch:
    """A day's haze and cast, and one stretch for all bands, as a provider's true-colour product has."""
    gain = np.array(day.cast) * (1 - day.haze)
    offset = np.array(day.cast) * np.array(day.air) * day.haze
    low, high = (float(v) for v in np.percentile(image[::7, ::7] * gain + offset, (0.3, 99.4)))
    low *= 0.75  # the darkest shadows stay off zero
    steps = TONES / max(high - low, 1e-3)
    tone = 245 * (np.arange(round(1.3 * TONES) + 1) / TONES) ** day.gamma
    return Stretch(tuple(gain * steps), tuple((offset - low) * steps), tone.astype(np.float32))


def develop(radiance: F32, day: Day, rng: np.random.Generator, stretch: Stretch | None = None) -> U8:
    """The 8-bit image of a radiance: haze, cast, blur, stretch (its own unless given), noise."""
    image = np.asarray(
        cv2.GaussianBlur(radiance, (5, 5), day.blur_px, borderType=cv2.BORDER_REFLECT_101), np.float32
    )
    stretch = stretch or stretch_of(image, day)
    seed = int(rng.integers(1 << 32))
    return sensor.develop(image, stretch.gain, stretch.offset, stretch.tone, day.noise, seed)


@dataclass(frozen=True)
class Holes:
    """Where the lidar of a place has nothing: `mask` uint8 [map / HOLE_CELLS] is 1, or, if so, on water."""

    mask: U8
    water: bool


def draw_holes(city: str, plan: Plan, size: int, rng: np.random.Generator) -> Holes:
    """The holes of a place: blobs or the straight edge of a flight strip; how much varies from place to place."""
    step = HOLE_CELLS
    side = -(-plan.side // step)
    mean = NO_DATA_SHARE.get(city, 0.02)
    # Few places with much, many with little; the mean is the city's.
    share = min(0.85, mean * float(rng.gamma(1.2, 1 / 1.2)))
    field: F32 = rng.standard_normal((side, side), np.float32)
    blob = max(1.5, 14.0 / (step * plan.cell))
    cv2.GaussianBlur(field, (0, 0), blob, dst=field)
    # The share is that of the ground which tiles of `size` pixels show, not of the rim around it.
    gsd_m = 1.4 * plan.cell
    shown = max(2, round(0.5 * size * gsd_m / (step * plan.cell)))
    strip = rng.random() < 0.5
    bearing = float(rng.uniform(0, 2 * math.pi))
    if strip:
        y, x = np.mgrid[0:side, 0:side].astype(np.float32) - side / 2
        ramp = x * math.cos(bearing) + y * math.sin(bearing)
        field = 0.15 * field / field.std() + (ramp / shown).astype(np.float32)
    middle = field[side // 2 - shown : side // 2 + shown, side // 2 - shown : side // 2 + shown]
    mask = (field > np.quantile(middle, 1 - share)).astype(np.uint8)
    # Water mirrors the pulse away; most releases filled it in, some did not.
    return Holes(mask, mean > 0.01 and rng.random() < 0.2)


def wall_gaps(city: str) -> float:
    """Share of a wall's pixels without height: a nadir-looking lidar meets walls now and then only."""
    return 0.25 * NO_DATA_SHARE.get(city, 0.02)


def label_cm(
    picture: Picture,
    plan: Plan,
    holes: Holes,
    gaps: float,
    speckle: float,
    rng: np.random.Generator,
) -> npt.NDArray[np.uint16]:
    """Heights as a label file holds them: uint16 cm, 65535 where the lidar has no data.

    `gaps` and `speckle` are shares of the pixels of walls and of all pixels.
    """
    water = plan.objects()[:, 12] == WATER
    step = -(-plan.side // holes.mask.shape[0])
    seed = int(rng.integers(1 << 32))
    gone = (water & holes.water).astype(np.uint8)
    return sensor.label(picture, holes.mask, step, gone, gaps, speckle, seed)
