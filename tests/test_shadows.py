"""Shadows that grow with raised heights: against geometry, and against scenes rendered higher."""

from __future__ import annotations

import math

import numpy as np
import pytest

from geopose_dist.augment import raise_heights
from geopose_dist.augment.shadows import estimate_sun
from geopose_dist.bench import cases_shadows

NADIR = 1e-6
"""A scale so small that nothing leans: the image is the ground."""


def block() -> tuple[np.ndarray, np.ndarray]:
    """A block 10 m high on columns 40..59, lit from the left, 1 px of shadow per metre: dark on columns 60..69."""
    agl = np.zeros((60, 120), np.float32)
    agl[20:40, 40:60] = 10
    rgb = np.full((60, 120, 3), 200, np.uint8)
    rgb[20:40, 60:70] = (80, 90, 100)
    return rgb, agl


def test_the_shadow_of_a_block_grows_by_the_factor() -> None:
    rgb, agl = block()
    out, _ = raise_heights(rgb, agl, NADIR, 0.0, 2.0, sun_px_per_m=(0.0, -1.0))
    dark = out[30, :, 0] < 150
    np.testing.assert_array_equal(np.flatnonzero(dark), np.arange(60, 80))
    np.testing.assert_array_equal(out[30, 75], (80, 90, 100))  # as dark as its own shadow is
    np.testing.assert_array_equal(out[10], rgb[10])  # nothing beside it changes
    unchanged, _ = raise_heights(rgb, agl, NADIR, 0.0, 2.0)
    np.testing.assert_array_equal(unchanged, rgb)


def test_a_tile_without_shadow_or_sun_is_left_alone() -> None:
    rgb, agl = block()
    flat = np.zeros_like(agl)
    out, _ = raise_heights(rgb, flat, NADIR, 0.0, 2.0, sun_px_per_m=(0.0, -1.0))
    np.testing.assert_array_equal(out, rgb)
    assert estimate_sun(rgb, flat, NADIR, 0.0, 0.5) is None
    assert estimate_sun(rgb, np.full_like(agl, np.nan), NADIR, 0.0, 0.5) is None


def test_the_sun_of_a_block_is_found() -> None:
    rgb, agl = block()
    sun = estimate_sun(rgb, agl, NADIR, 0.0, 1.0)
    assert sun is not None
    assert cases_shadows.sun_error_deg(sun, (0.0, -1.0)) <= 5
    assert math.hypot(*sun) == pytest.approx(1, rel=0.15)


def test_a_sun_that_is_no_number_is_refused() -> None:
    rgb, agl = block()
    with pytest.raises(ValueError, match=r"sun_px_per_m is \(nan, 1\.0\); wanted two finite numbers"):
        raise_heights(rgb, agl, 0.5, 0.0, 2.0, sun_px_per_m=(math.nan, 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("city", ["ATL", "OMA"])
def test_nearer_to_the_scene_rendered_higher(city: str) -> None:
    """The figures of docs/decisions.md, held loosely: by the known sun, and by one guessed from the tile alone."""
    made = cases_shadows.scene(city, 0, (2.0,))
    sun = estimate_sun(made.rgb, made.agl_m, made.scale_px_per_m, made.angle_rad, made.gsd_m)
    assert sun is not None
    assert cases_shadows.sun_error_deg(sun, made.sun_px_per_m) <= 10
    figures = cases_shadows.compared(made, 0, sun)
    assert figures["raised"] < 0.65 * figures["unwarped"]
    assert figures["with_known_sun"] < 0.75 * figures["raised"]
    assert figures["with_guessed_sun"] < 0.85 * figures["raised"]
    assert figures["wrong_shade_share"] > 0.03, "or there would be nothing to mend"
