"""One tile as a row of small images: the picture with its flow, true and predicted height, error, rectified pair.

The pictures share one height scale per tile and say it in strips below. Errors are predicted less true heights.
The pair lies one picture over the other with a slider between them: in a report the tile moved to ground
position by its truth and by its prediction, in a data set as photographed and by its labels. Streets straight
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

SIDE_PX = 360
"""Longer side of a picture on a page."""
PAIR_SIDE_PX = 560
"""Longer side of the pair, which is shown larger."""


@dataclass(frozen=True)
class Surface:
    """Heights float32 [H, W] in metres (NaN unknown) and the pose that turns them into flow."""

    agl_m: F32
    pose: Pose


@dataclass(frozen=True)
class Bar:
    """The legend of coloured pictures: a matplotlib map, what it shows, its least and greatest value in metres."""

    map_name: str
    shows: str
    low_m: float
    high_m: float


@dataclass(frozen=True)
class Row:
    """What is shown of one tile, small enough to travel between processes.

    Attributes:
        pictures: (image uint8 [h, w, 3], caption) in reading order.
        pair: two more of one size, of which a page shows one over the other.
        bars: what the colours mean.
    """

    pictures: list[tuple[U8, str]]
    pair: list[tuple[U8, str]]
    bars: list[Bar]

    def html(self) -> str:
        """For a page: pictures, the pair with its slider, strips of colour below."""
        images = [page.picture(figures.data_uri(image, SIDE_PX), caption) for image, caption in self.pictures]
        (left, left_name), (right, right_name) = self.pair
        uris = [figures.data_uri(image, PAIR_SIDE_PX, quality=80) for image in (left, right)]
        pair = page.slider((uris[0], left_name), (uris[1], right_name))
        bars = [
            figures.scale_bar(bar.map_name, f"{bar.shows} {bar.low_m:.0f} m", f"{bar.high_m:+.0f} m")
            if bar.low_m < 0
            else figures.scale_bar(bar.map_name, f"{bar.shows} {bar.low_m:.0f} m", f"{bar.high_m:.0f} m")
            for bar in self.bars
        ]
        return page.panels(images, pair) + "".join(bars)


def labelled(rgb: U8, true: Surface, side: int = SIDE_PX) -> Row:
    """A tile with its labels: picture with true flow, height, and rectified. For data exploration."""
    top_m = height_limit(true.agl_m)
    drawn, factor = figures.with_arrows(rgb, true.agl_m, [(true.pose, true.agl_m, TRUE_COLOUR)], side)
    pictures = [
        (drawn, f"image; flow {_times(factor)}"),
        (figures.coloured(true.agl_m, 0.0, top_m, HEIGHT_MAP), "height (grey: unknown)"),
    ]
    pair = [(rgb, "as photographed"), (rectified(rgb, true), "rectified (black: hidden)")]
    return _row(pictures, pair, [Bar(HEIGHT_MAP, "height", 0.0, top_m)], side)


def compared(rgb: U8, true: Surface, predicted: Surface, side: int = SIDE_PX) -> Row:
    """A tile with truth and prediction; all arrays [H, W] of one size."""
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
    ]
    pair = [
        (rectified(rgb, true), "rectified by the truth"),
        (rectified(rgb, predicted), "by the prediction (black: hidden)"),
    ]
    bars = [Bar(HEIGHT_MAP, "height", 0.0, top_m), Bar(ERROR_MAP, "error", -most_m, most_m)]
    return _row(pictures, pair, bars, side)


def _row(pictures: list[tuple[U8, str]], pair: list[tuple[U8, str]], bars: list[Bar], side: int) -> Row:
    larger = max(side, PAIR_SIDE_PX)
    return Row(
        [(figures.reduced(image, side), caption) for image, caption in pictures],
        [(figures.reduced(image, larger), caption) for image, caption in pair],
        bars,
    )


def rectified(rgb: U8, surface: Surface) -> U8:
    """The picture [H, W, 3] moved to ground position by `surface`; what the camera did not see is black."""
    pose = surface.pose
    flat, _, occluded = kernels.rectify(rgb, surface.agl_m, pose.scale_px_per_m, pose.angle_rad)
    flat = np.array(flat)
    flat[occluded] = 0
    return flat


def _times(factor: int) -> str:
    return "to scale" if factor == 1 else f"{factor} times as long"
