"""The heads: from decoder maps and deepest features to height, magnitude, direction and scale.

All of them compute in float32 outside autocast: heights reach 200 m, and their sums of squares over a
tile overflow fp16 (the benchmark's least-squares scale became 0 with a zero gradient there).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from geopose_dist import geometry
from geopose_dist.model.inputs import shown

LEAST_SQUARES_RIDGE = 1e-6
"""Keeps 0/0 of an all-flat prediction finite; the benchmark's 0.01 biased flat tiles."""


MAX_ZENITH_RAD = 0.9
"""52 degrees; the challenge's sensors stay within 36."""


class Prediction(NamedTuple):
    """What the network says of a batch.

    Attributes:
        agl_m: heights, float32 [B, 1, H, W] metres.
        magnitude_px: flow magnitude, float32 [B, 1, H, W] pixels.
        direction: (sin, cos) of the angle, float32 [B, 2]; not necessarily of unit length.
        scale_px_per_m: float32 [B].
        direction_map: the vectors that `direction` was pooled from, float32 [B, 2, H, W], or None.
    """

    agl_m: Tensor
    magnitude_px: Tensor
    direction: Tensor
    scale_px_per_m: Tensor
    direction_map: Tensor | None


def inverse_softplus(value: float) -> float:
    """The x whose softplus is `value`."""
    return value + math.log(-math.expm1(-value))


def least_squares_scale(agl_m: Tensor, magnitude_px: Tensor, inside: Tensor | None, ridge: float) -> Tensor:
    """Scale [B] in px/m that best explains magnitudes by heights: h.m / (h.h + ridge), in float32.

    `inside` is a bool [B, 1, H, W], False on padding; None means all. It works on predictions, so pixels
    without lidar truth count like any other (DOMAIN section 4; the benchmark's ridge is 0.01).
    """
    height, magnitude = agl_m.float(), magnitude_px.float()
    if inside is not None:
        height = height * inside
    product = (height * magnitude).sum(dim=(1, 2, 3))
    square = (height * height).sum(dim=(1, 2, 3))
    return product / (square + ridge)


def edge_weights(agl_m: Tensor) -> Tensor:
    """How much each pixel's vector counts for the tile: the height's gradient, [B, 1, H, W], sum 1 a tile.

    Detached: the network must not bend heights to please the direction. A tenth of the mean is added so
    that an early, flat prediction still averages over all pixels.
    """
    height = agl_m.detach()
    down = functional.pad((height[:, :, 1:] - height[:, :, :-1]).abs(), (0, 0, 0, 1))
    right = functional.pad((height[:, :, :, 1:] - height[:, :, :, :-1]).abs(), (0, 1))
    weight = down + right
    weight = weight + 0.1 * weight.mean(dim=(2, 3), keepdim=True) + 1e-6
    return weight / weight.sum(dim=(2, 3), keepdim=True)


class PooledScale(nn.Module):
    """A positive scale [B] from the pooled deepest features.

    Args:
        channels: of the deepest features.
        start_px_per_m: what it answers before training.
    """

    def __init__(self, channels: int, start_px_per_m: float) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, inverse_softplus(start_px_per_m))

    def forward(self, pooled: Tensor) -> Tensor:
        """Scale [B] in px/m of pooled features [B, C]."""
        scale: Tensor = functional.softplus(self.linear(pooled))
        return scale[:, 0]


class ZenithScale(nn.Module):
    """A scale [B] from the camera's zenith angle z, which is predicted, and the GSD, which is known.

    scale = sin z / p with the pixel across the look p = gsd sqrt(cos z) (`geometry.zenith_from_scale`). Zooming a
    tile changes scale and GSD alike and leaves z, so the image alone has to tell one angle.

    Args:
        channels: of the deepest features.
        start_px_per_m: what it answers before training at the GSD `typical_gsd_m`.
        typical_gsd_m: where the learned stand-in for unknown GSDs starts.
        dropout: probability with which the GSD is hidden from a tile in training.
    """

    def __init__(self, channels: int, start_px_per_m: float, typical_gsd_m: float, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 1)
        self.log_gsd = nn.Parameter(torch.tensor(math.log(typical_gsd_m)))
        self.dropout = dropout
        zenith = min(
            max(geometry.zenith_from_scale(start_px_per_m, typical_gsd_m), 0.01), MAX_ZENITH_RAD - 0.01
        )
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, math.log(zenith / (MAX_ZENITH_RAD - zenith)))

    def forward(self, pooled: Tensor, gsd_m: Tensor) -> Tensor:
        """Scale [B] in px/m of pooled features [B, C] and GSDs [B] in metres, NaN where unknown."""
        known = torch.isfinite(gsd_m) & shown(gsd_m, self.dropout if self.training else 0.0)
        gsd_m = torch.where(known, gsd_m, self.log_gsd.exp())
        zenith = MAX_ZENITH_RAD * torch.sigmoid(self.linear(pooled)[:, 0])
        scale: Tensor = zenith.sin() / (gsd_m * zenith.cos().sqrt())
        return scale


class FullResolutionSkip(nn.Module):
    """Two convolutions on the image itself, joined to the decoder's last block.

    The decoder's own skips end at half resolution: smp's last block only enlarges. This one shows the heads
    where an edge is to the pixel.

    Args:
        channels: of its features.
        width: of the decoder's last block.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
        )
        self.join = nn.Conv2d(width + channels, width, 3, padding=1)

    def forward(self, image: Tensor, decoded: Tensor) -> Tensor:
        """The decoder's features [B, width, H, W], told of the normalised image [B, 3, H, W]."""
        joined: Tensor = decoded + self.join(torch.cat([decoded, self.look(image)], dim=1))
        return joined
