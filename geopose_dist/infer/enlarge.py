"""A reduced network's heights at full size again, where the image itself is at hand along its edges.

bilinear: straight between the centres of reduced pixels. slopes: the inverse of the reduction, planes limited at
edges. guided: bilinear, then locally a straight function of the image's grey values (He et al., "Guided Image
Filtering", 2010), so that roofs end where the image says; without the full-size image it is bilinear.
`geopose bench enlarge` scores them; PERFORMANCE.md has the table behind the default.
"""

from __future__ import annotations

import cv2
import numpy as np

from geopose_dist.data import resample
from geopose_dist.data.sample import U8
from geopose_dist.geometry import F32

GUIDE_RADIUS_PX = 2
GUIDE_EPSILON = 10.0
"""Of grey values 0 .. 255, squared: weaker edges of the image are ignored."""


def enlarge(agl_m: F32, factor: int, size: tuple[int, int], way: str, rgb: U8 | None = None) -> F32:
    """float32 metres [h, w] -> `size` (rows, columns) by `way`; `rgb` [rows, columns, 3] is the image at full size."""
    if factor == 1 or way == "slopes":
        return resample.enlarge_agl(agl_m, factor, size)
    rows, columns = agl_m.shape
    large = cv2.resize(agl_m, (columns * factor, rows * factor), interpolation=cv2.INTER_LINEAR)
    cut = np.ascontiguousarray(large[: size[0], : size[1]], np.float32)
    return cut if rgb is None or way == "bilinear" else guided(cut, rgb)


def guided(agl_m: F32, rgb: U8, radius_px: int = GUIDE_RADIUS_PX, epsilon: float = GUIDE_EPSILON) -> F32:
    """Heights [H, W] filtered along the edges of their image [H, W, 3]."""
    if agl_m.shape != rgb.shape[:2]:
        raise ValueError(f"heights of {agl_m.shape} and an image of {rgb.shape[:2]}; wanted one size")
    side = (2 * radius_px + 1,) * 2
    grey = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY).astype(np.float32)
    mean_grey, mean_m = cv2.boxFilter(grey, -1, side), cv2.boxFilter(agl_m, -1, side)
    both = cv2.boxFilter(grey * agl_m, -1, side) - mean_grey * mean_m
    spread = cv2.boxFilter(grey * grey, -1, side) - mean_grey * mean_grey
    slope = both / (np.maximum(spread, 0) + np.float32(epsilon))
    level = mean_m - slope * mean_grey
    return np.asarray(cv2.boxFilter(slope, -1, side) * grey + cv2.boxFilter(level, -1, side), np.float32)
