"""The official score on the validation split: never augmented, exact over ranks.

Each rank predicts its own share of the tiles, whole, and turns each into moments (float64 sums); the
moments of all ranks together give the score, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from geopose_dist.data.loader import evaluation_indices
from geopose_dist.data.manifest import ShardSet
from geopose_dist.data.reader import Reader
from geopose_dist.data.sample import View
from geopose_dist.evaluate.moments import Moments, TileMoments
from geopose_dist.geometry import F32, Pose, angle_of
from geopose_dist.model.heads import Prediction
from geopose_dist.model.inputs import city_numbers, gsd_tensor
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.runtime import World
from geopose_dist.train.step import DTYPES

MIN_SCALE_PX_PER_M = 1e-4
"""Predicted scales are limited from below here, as prediction does: the score refuses 0."""


def evaluate(
    net: GeoposeNet, shards: ShardSet, world: World, *, precision: str, batch: int
) -> dict[str, Any]:
    """Score of `net` on a split: the dictionary of `geopose evaluate`, equal on all ranks.

    Args:
        net: the network; put into eval mode for the time.
        shards: the validation split.
        world: the ranks that share the work; all of them must call this.
        precision: of the forward pass, as in the training recipe.
        batch: tiles of one size that go through the network together.
    """
    was_training = net.training
    net.eval()
    mine = Moments()
    try:
        indices = evaluation_indices(len(shards), world.rank, world.size)
        for views in _like_sized(Reader(shards), [int(i) for i in indices], batch):
            for view, answer in zip(views, predict(net, views, world.device, precision), strict=True):
                if view.agl_m is not None:
                    scale, angle = answer.pose.scale_px_per_m, answer.pose.angle_rad
                    truth = (view.agl_m, view.scale_px_per_m, view.angle_rad)
                    mine.add(Moments.of_tile(view.city, answer.agl_m, scale, angle, *truth))
    finally:
        net.train(was_training)
    parts = world.gather_objects([(tile.city, tile.values.tolist()) for tile in mine.tiles])
    everyone = Moments([TileMoments(city, np.array(values)) for part in parts for city, values in part])
    return everyone.scores()


def _like_sized(reader: Reader, indices: Sequence[int], batch: int) -> Iterator[list[View]]:
    group: list[View] = []
    for index in indices:
        view = reader.view(index)
        if group and (len(group) == batch or group[0].rgb.shape != view.rgb.shape):
            yield group
            group = []
        group.append(view)
    if group:
        yield group


@dataclass(frozen=True)
class Answer:
    """What the network says of a tile: heights float32 [H, W] metres from 0, and the pose."""

    agl_m: F32
    pose: Pose


@torch.inference_mode()
def predict(net: GeoposeNet, views: list[View], device: torch.device, precision: str) -> list[Answer]:
    """Answers of a network in eval mode for like-sized `views`, padded by reflection to what it takes."""
    rows, columns = views[0].rgb.shape[:2]
    pad = ((0, 0), (0, -rows % 32), (0, -columns % 32), (0, 0))
    rgb = np.pad(np.stack([view.rgb for view in views]), pad, mode="symmetric").transpose(0, 3, 1, 2)
    gsd_m = gsd_tensor([view.gsd_m for view in views])
    city = city_numbers(net.recipe.cities, [view.city for view in views])
    pixels = torch.from_numpy(np.ascontiguousarray(rgb)).to(device)
    dtype = DTYPES[precision]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        prediction: Prediction = net(pixels, gsd_m.to(device), None, city.to(device))
    heights = prediction.agl_m[:, 0, :rows, :columns].clamp(min=0).cpu().numpy()
    directions = prediction.direction.double().cpu().numpy()
    scales = prediction.scale_px_per_m.clamp(min=MIN_SCALE_PX_PER_M).double().cpu().numpy()
    return [
        Answer(agl_m, Pose(angle_of(float(x), float(y)), float(scale), view.gsd_m))
        for view, agl_m, (x, y), scale in zip(views, heights, directions, scales, strict=True)
    ]
