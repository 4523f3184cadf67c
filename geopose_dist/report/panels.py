"""One tile as a row of small images: the picture with its flow, true and predicted height, error, rectified.

The pictures share one height scale per tile and say it in a strip below. Errors are predicted less true
heights. The rectified picture is the tile moved to ground position by its *prediction*: streets straight
under towers mean that height, scale and angle are right together. Black there = hidden from the camera.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from geopose_dist import kernels
from geopose_dist.data.sample import U8
from geopose_dist.evaluate.pictures import (
    ERROR_MAP,
    HEIGHT_MAP,
    PREDICTED_COLOUR,
    TRUE_COLOUR,
    height_limit,
)
from geopose_dist.geometry import F32, Pose
from geopose_dist.report import figures, page


@dataclass(frozen=True)
class Surface:
    """Heights float32 [H, W] in metres (NaN unknown) and the pose that turns them into flow."""

    agl_m: F32
    pose: Pose


def labelled(rgb: U8, true: Surface, side: int = 360) -> str:
    """Panels of a tile with its labels: picture with true flow, and height. For data exploration."""
    top_m = height_limit(true.agl_m)
    drawn, factor = figures.with_arrows(rgb, true.agl_m, [(true.pose, true.agl_m, TRUE_COLOUR)], side)
    heights = figures.coloured(true.agl_m, 0.0, top_m, HEIGHT_MAP)
    parts = [
        page.picture(figures.data_uri(drawn, side), f"image; flow {_times(factor)}"),
        page.picture(figures.data_uri(heights, side), f"height, 0 to {top_m:.0f} m"),
    ]
    return page.grid(parts, "panels")


def compared(rgb: U8, true: Surface, predicted: Surface, side: int = 360) -> str:
    """Panels of a tile with truth and prediction; all arrays [H, W] of one size."""
    top_m = height_limit(true.agl_m)
    error_m = predicted.agl_m - true.agl_m
    most_m = height_limit(np.abs(error_m), least_m=2.0)
    arrows = [
        (true.pose, true.agl_m, TRUE_COLOUR),
        (predicted.pose, predicted.agl_m, PREDICTED_COLOUR),
    ]
    drawn, factor = figures.with_arrows(rgb, true.agl_m, arrows, side)
    pictures = [
        (drawn, f"image; flow {_times(factor)}: true blue, predicted orange"),
        (figures.coloured(true.agl_m, 0.0, top_m, HEIGHT_MAP), "true height (grey: unknown)"),
        (figures.coloured(predicted.agl_m, 0.0, top_m, HEIGHT_MAP), "predicted height"),
        (figures.coloured(error_m, -most_m, most_m, ERROR_MAP), "predicted less true height"),
        (rectified(rgb, predicted), "rectified by the prediction (black: hidden)"),
    ]
    images = [page.picture(figures.data_uri(image, side), caption) for image, caption in pictures]
    bars = figures.scale_bar(HEIGHT_MAP, "height 0 m", f"{top_m:.0f} m")
    bars += figures.scale_bar(ERROR_MAP, f"error -{most_m:.0f} m", f"+{most_m:.0f} m")
    return page.grid(images, "panels") + bars


def rectified(rgb: U8, surface: Surface) -> U8:
    """The picture [H, W, 3] moved to ground position by `surface`; what the camera did not see is black."""
    pose = surface.pose
    flat, _, occluded = kernels.rectify(rgb, surface.agl_m, pose.scale_px_per_m, pose.angle_rad)
    flat = np.array(flat)
    flat[occluded] = 0
    return flat


def _times(factor: int) -> str:
    return "to scale" if factor == 1 else f"{factor} times as long"
