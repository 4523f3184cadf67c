"""A few validation tiles to look at after each validation: picture with flow, true and predicted height, error.

Always the same tiles, evenly spread over the split, so that TensorBoard's slider shows them being learned.
Rank 0 predicts and draws them; the others go on to wait in the next exchange.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from geopose_dist.data.manifest import ShardSet
from geopose_dist.data.reader import Reader
from geopose_dist.data.sample import U8, View
from geopose_dist.evaluate import pictures
from geopose_dist.geometry import F32, Pose
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.train import validate
from geopose_dist.train.session import Session
from geopose_dist.train.step import uncompiled

SIDE_PX = 320
"""Longer side of each of a tile's four pictures."""


def show(session: Session, net: GeoposeNet) -> None:
    """Draw the fixed tiles as `net` sees them and write them to TensorBoard; on rank 0, elsewhere nothing."""
    count = session.recipe.validation.panels
    if not (session.world.is_first and count and session.validation is not None):
        return
    was_training = net.training
    net.eval()
    try:
        for number, view in enumerate(fixed_tiles(session.validation, count)):
            with uncompiled():
                (answer,) = validate.predict(net, [view], session.world.device, session.recipe.precision)
            if np.isfinite(answer.agl_m).all() and math.isfinite(
                answer.pose.angle_rad + answer.pose.scale_px_per_m
            ):
                image = panel(view, answer.agl_m, answer.pose)
                session.log.picture(f"validation/{number}-{view.key}", image, session.progress.step)
    finally:
        net.train(was_training)


def fixed_tiles(shards: ShardSet, count: int) -> list[View]:
    """Up to `count` tiles, evenly spread over the split."""
    reader = Reader(shards)
    rows = np.unique(np.linspace(0, len(shards) - 1, min(count, len(shards))).round().astype(int))
    return [reader.view(int(row)) for row in rows]


def panel(view: View, agl_m: F32, pose: Pose) -> U8:
    """One tile as a row of four pictures, uint8 [H, 4 W, 3]; three without true heights.

    Image with flow arrows (true blue, predicted orange), true height, predicted height, predicted less true.
    """
    truth = np.full_like(agl_m, np.nan) if view.agl_m is None else view.agl_m
    top_m = pictures.height_limit(truth if view.agl_m is not None else agl_m)
    arrows = [(pose, agl_m, pictures.PREDICTED_COLOUR)]
    if view.pose is not None and view.agl_m is not None:
        arrows.insert(0, (view.pose, truth, pictures.TRUE_COLOUR))
    drawn, _ = pictures.with_arrows(view.rgb, agl_m if view.agl_m is None else truth, arrows, SIDE_PX)
    maps = [pictures.coloured(agl_m, 0.0, top_m, pictures.HEIGHT_MAP)]
    if view.agl_m is not None:
        error_m = agl_m - truth
        most_m = pictures.height_limit(np.abs(error_m), least_m=2.0)
        maps.insert(0, pictures.coloured(truth, 0.0, top_m, pictures.HEIGHT_MAP))
        maps.append(pictures.coloured(error_m, -most_m, most_m, pictures.ERROR_MAP))
    rows, columns = drawn.shape[:2]
    sized = [cv2.resize(one, (columns, rows), interpolation=cv2.INTER_AREA) for one in maps]
    row: U8 = np.concatenate([drawn, *(one.astype(np.uint8, copy=False) for one in sized)], axis=1)
    return row
