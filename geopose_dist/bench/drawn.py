"""A drawn tile for benchmarks: a city as it looks, roughly, made in a moment."""

from __future__ import annotations

import cv2
import numpy as np

from geopose_dist.data.sample import U8
from geopose_dist.geometry import F32


def city(side: int, seed: int = 0) -> tuple[U8, F32]:
    """A drawn tile (rgb, agl_m) with flat roofs, a slope and rough ground: labels as they look, roughly."""
    rng = np.random.default_rng(seed)
    ground = cv2.resize(
        rng.uniform(0, 3, (side // 32, side // 32)), (side, side), interpolation=cv2.INTER_CUBIC
    )
    agl_m = np.maximum(ground - 1, 0).astype(np.float32)
    for _ in range((side // 64) ** 2):
        row, column = rng.integers(0, side, 2)
        rows, columns = rng.integers(8, 60, 2)
        agl_m[row : row + rows, column : column + columns] = rng.uniform(3, 40)
    rgb = np.stack([agl_m * 5, 255 - agl_m * 3, np.full_like(agl_m, 90)], -1).clip(0, 255).astype(np.uint8)
    return rgb, agl_m + rng.normal(0, 0.02, agl_m.shape).astype(np.float32).clip(0)
