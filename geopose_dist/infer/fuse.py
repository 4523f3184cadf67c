"""One direction and one scale for a scene, from the answers of its windows: medians, which a few bad ones cannot bend.

The camera is affine over a scene, so every window estimates the same two numbers. A window counts by how
much its surfaces stand above the ground: a lawn does not show the lean. The direction is the weighted
spatial median of unit vectors (averaging angles would break at the wrap), the scale that of the logarithms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from geopose_dist import geometry
from geopose_dist.geometry import F64


@dataclass(frozen=True)
class Fused:
    """The pose of a scene.

    Attributes:
        angle_rad: in [0, 2 pi).
        scale_px_per_m: as the windows' scales were.
        angle_spread_deg: weighted median of the windows' distances from the angle.
        scale_spread_px_per_m: weighted median of the windows' distances from the scale.
        windows: how many counted.
    """

    angle_rad: float
    scale_px_per_m: float
    angle_spread_deg: float
    scale_spread_px_per_m: float
    windows: int


def fuse(vectors: F64, log_scales: F64, weights: F64) -> Fused:
    """The pose that windows agree on.

    Args:
        vectors: directions (x, y) [N, 2]; shorter ones than 1 are of windows that disagreed with themselves.
        log_scales: natural logarithms of px/m [N].
        weights: [N], >= 0; if all are 0, all windows count alike. ValueError without any window.
    """
    if not len(vectors):
        raise ValueError("no window to fuse a pose from")
    if not weights.any():
        weights = np.ones_like(weights)
    counted = weights > 0
    vectors, log_scales, weights = vectors[counted], log_scales[counted], weights[counted]
    x, y = spatial_median(vectors, weights)
    angle = geometry.angle_of(x, y)
    angles = np.array([geometry.angle_of(*map(float, vector)) for vector in vectors])
    log_scale = weighted_median(log_scales, weights)
    scale = float(np.exp(log_scale))
    return Fused(
        angle,
        scale,
        weighted_median(geometry.angle_difference_deg(angles, angle), weights),
        weighted_median(np.abs(np.exp(log_scales) - scale), weights),
        len(vectors),
    )


def weighted_median(values: F64, weights: F64) -> float:
    """The value at which half of the weight is reached; between two values if it is reached exactly there."""
    order = np.argsort(values, kind="stable")
    values, reached = values[order], np.cumsum(weights[order])
    half = reached[-1] / 2
    i = int(np.searchsorted(reached, half))
    if reached[i] == half and i + 1 < len(values):
        return float((values[i] + values[i + 1]) / 2)
    return float(values[i])


def spatial_median(points: F64, weights: F64) -> tuple[float, float]:
    """The point [2] with the least weighted sum of distances (Weiszfeld's iteration, from the mean)."""
    at = np.average(points, axis=0, weights=weights)
    for _ in range(200):
        share = weights / np.maximum(np.linalg.norm(points - at, axis=1), 1e-9)
        new = (points * share[:, None]).sum(axis=0) / share.sum()
        if np.linalg.norm(new - at) < 1e-12:
            break
        at = new
    return float(at[0]), float(at[1])
