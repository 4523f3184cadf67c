"""Case `shadows`: how near raised heights come to the same scene rendered higher, with and without longer shadows.

A place is rendered, rendered again with all its heights multiplied, and the first picture is raised to the second.
Differences are means of |RGB - truth| over the pixels that raising can know, 50 px of border left out. No baseline of
others stands beside it: what is compared is our own warp without the option.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from geopose_dist.augment import raise_heights
from geopose_dist.augment.shadows import Sun, estimate_sun
from geopose_dist.geometry import F32

U8 = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

CITIES = ("JAX", "ATL", "OMA", "ARG")
FACTORS = (1.3, 2.0)
PLACES = 2
SIDE = 320
PLAN_SIDE = 768
"""The place is planned for larger tiles, so that higher lines of sight still end on it."""
BORDER = 50
QUICK = {"CITIES": ("JAX",), "FACTORS": (1.3,), "PLACES": 1}


@dataclass(frozen=True)
class Scene:
    """One place from one camera under one sun, as it is and with its heights multiplied.

    Attributes:
        rgb, agl_m, lit: of the place as it is; lit is bool [H, W].
        higher: (factor, rgb, lit) of the place rendered higher.
        scale_px_per_m, angle_rad, gsd_m: of the camera.
        sun_px_per_m: rows and columns towards the sun per metre of climb.
    """

    rgb: U8
    agl_m: F32
    lit: Mask
    higher: tuple[tuple[float, U8, Mask], ...]
    scale_px_per_m: float
    angle_rad: float
    gsd_m: float
    sun_px_per_m: Sun


def scene(city: str, place: int, factors: tuple[float, ...] = (), seed: int = 3) -> Scene:
    """Render a place as it is and with all heights multiplied by each factor (the case's unless told), without haze,
    blur or noise.
    """
    factors = factors or FACTORS
    from geopose_dist.kernels.render import Terrain
    from shards import synth_camera, synth_districts, synth_look, synth_tiles

    plan = synth_districts.build(city, PLAN_SIDE, seed, place)
    camera: synth_camera.Camera = synth_tiles.view_camera(city, PLAN_SIDE, seed, place, 0)
    camera = dataclasses.replace(camera, centre_m=(0.0, 0.0))
    day = synth_look.draw_day(city, synth_districts.keyed(seed, place, 5, 0))
    pictures = [
        synth_look.take_picture(
            plan, Terrain(plan.height * np.float32(factor)), plan.around(), camera, day, SIDE
        )
        for factor in (1.0, *factors)
    ]
    low, high = np.percentile(pictures[0].radiance, (0.3, 99.4))

    def developed(radiance: F32) -> U8:
        shown: U8 = np.rint(
            np.clip((radiance - 0.75 * low) / (high - 0.75 * low), 0, 1.3) ** 0.5 * 220
        ).astype(np.uint8)
        return shown

    affine = camera.affine((SIDE, SIDE), plan.cell, plan.height.shape)
    x, y, z = day.light.to_sun
    right, down = np.linalg.inv(affine.cell_from_pixel[:, :2]) @ np.array([x / z, y / z]) / plan.cell
    first, *others = ((developed(picture.radiance), picture.lit.astype(np.bool_)) for picture in pictures)
    return Scene(
        *(first[0], pictures[0].agl_m, first[1]),
        higher=tuple((factor, *other) for factor, other in zip(factors, others, strict=True)),
        scale_px_per_m=camera.scale_px_per_m,
        angle_rad=camera.angle_rad,
        gsd_m=camera.gsd_m,
        sun_px_per_m=(float(down), float(right)),
    )


def compared(made: Scene, which: int, sun: Sun | None) -> dict[str, float]:
    """Shares and mean differences for one factor; `sun` is the guessed one."""
    factor, truth, lit = made.higher[which]
    tile = made.rgb, made.agl_m, made.scale_px_per_m, made.angle_rad, factor
    warped, agl_m = raise_heights(*tile)
    known, guessed = (
        warped if one is None else raise_heights(*tile, sun_px_per_m=one)[0]
        for one in (made.sun_px_per_m, sun)
    )
    shade = np.repeat(made.lit[..., None] * np.uint8(255), 3, axis=2)
    moved_lit = raise_heights(shade, *tile[1:])[0][..., 0] > 127
    looked_at = np.zeros(lit.shape, np.bool_)
    looked_at[BORDER:-BORDER, BORDER:-BORDER] = True
    looked_at &= np.isfinite(agl_m)
    wrong = looked_at & (moved_lit != lit)

    def difference(image: U8, where: Mask) -> float:
        return float(np.abs(image.astype(np.float32) - truth)[where].mean())

    return {
        "wrong_shade_share": float(wrong.sum() / looked_at.sum()),
        "unwarped": difference(made.rgb, looked_at),
        "raised": difference(warped, looked_at),
        "raised_where_shade_is_right": difference(warped, looked_at & ~wrong),
        "with_known_sun": difference(known, looked_at),
        "with_guessed_sun": difference(guessed, looked_at),
    }


def sun_error_deg(found: Sun, true: Sun) -> float:
    """Degrees between two suns' bearings in the image."""
    between = math.degrees(math.atan2(*found) - math.atan2(*true))
    return abs((between + 180) % 360 - 180)


def bench_shadows() -> list[dict[str, Any]]:
    """A row per city and factor, means over places."""
    from geopose_dist.bench.harness import check

    rows: list[dict[str, Any]] = []
    for city in CITIES:
        scenes = [scene(city, place) for place in range(PLACES)]
        began = time.thread_time()
        suns = [
            estimate_sun(one.rgb, one.agl_m, one.scale_px_per_m, one.angle_rad, one.gsd_m) for one in scenes
        ]
        guess_s = (time.thread_time() - began) / PLACES
        errors = [
            180.0 if sun is None else sun_error_deg(sun, one.sun_px_per_m)
            for sun, one in zip(suns, scenes, strict=True)
        ]
        for which, factor in enumerate(FACTORS):
            figures = [compared(one, which, sun) for one, sun in zip(scenes, suns, strict=True)]
            means = {name: float(np.mean([each[name] for each in figures])) for name in figures[0]}
            nearer = means["raised"] < means["unwarped"]
            check(nearer, f"{city} x {factor}: raising takes the picture away from the scene rendered higher")
            gain = means["raised"] / means["with_guessed_sun"]
            rows.append(
                {
                    "name": f"{city} x {factor}",
                    **means,
                    "sun_error_deg": max(errors),
                    "guess_cpu_s": guess_s,
                    "verdict": f"{city} x {factor}: a guessed sun divides the difference by {gain:.2f}",
                }
            )
    return rows


CASES: dict[str, Callable[..., list[dict[str, Any]]]] = {"shadows": bench_shadows}
