"""The relief under a synthetic city: hills that are long beside its houses."""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt


def hills(side: int, cell_m: float, height_m: float, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Bare ground of rolling hills, float32 [side, side] in metres, its lowest 0: waves of 250 to 1,600 m whose heights
    add up to `height_m`, laid out from the map's middle, so that they do not depend on its size."""
    step = 16
    points = side // step + 2
    at = (np.arange(points) * step - side / 2) * cell_m
    lengths = np.exp(rng.uniform(math.log(250), math.log(1600), 10))
    shares = lengths * rng.uniform(0.5, 1.0, 10)
    field = np.zeros((points, points))
    for length, share in zip(lengths, shares / shares.sum(), strict=True):
        bearing, phase = rng.uniform(0, 2 * math.pi, 2)
        along = (at * math.cos(bearing) + at[:, None] * math.sin(bearing)) * 2 * math.pi / length
        field += height_m * share * np.sin(along + phase)
    # Steps of a cell are centimetres: a straight line between points 4 to 6 m apart is as good as the wave.
    whole = cv2.resize(field.astype(np.float32), (points * step, points * step))[:side, :side]
    return np.ascontiguousarray(whole - whole.min())
