"""Samples as the reader gives them, for tests of augmentation: one view with everything known, and comparing two."""

from __future__ import annotations

import dataclasses

import numpy as np

from geopose_dist.augment import AugmentRecipe
from geopose_dist.data.sample import View

POSE = {"gsd_m": 0.5, "scale_px_per_m": 0.6, "angle_rad": 0.7}

ALL_AT_ONCE = AugmentRecipe("strong", heights_p=1.0, rotate_p=1.0, zoom_p=1.0, tone_p=1.0)


def keyed(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[*key, 0][:2]))


def view(rows=64, cols=90, **changes) -> View:
    rng = keyed(1)
    agl = np.zeros((rows, cols), np.float32)
    agl[rows // 4 : rows // 2, cols // 4 : cols // 2] = 12
    rgb = rng.integers(0, 256, (rows, cols, 3), dtype=np.uint8)
    return dataclasses.replace(View("JAX_a", "JAX", rgb, agl, **POSE), **changes)


def assert_same(found: View, wanted: View) -> None:
    """Everything equal, pixels and heights to the bit."""
    np.testing.assert_array_equal(found.rgb, wanted.rgb)
    for name in ("agl_m", "inside"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert (one is None) == (other is None), name
        if one is not None:
            np.testing.assert_array_equal(one, other)
    for name in ("key", "city", "gsd_m", "scale_px_per_m", "angle_rad", "place", "part"):
        assert getattr(found, name) == getattr(wanted, name), name
