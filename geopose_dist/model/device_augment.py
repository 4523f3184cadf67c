"""The device's half of augmentation: the pixels of what the workers drew (`augment.where: device`).

The same as `augment.apply` by the same arithmetic - the one composed map in float64, weights of 1/128, whole-number
colours, heights of the nearest pixel - so that on one device or another a sample gets the bytes that a worker
would have made; only lines of sight (line_of_sight.py, float32) may round the other way, and the noise comes from
the device's generator. A batch mixes draws: its samples are resampled together, and only raising, whose steps
differ, and the noise go sample by sample. Nothing here waits for the device.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from geopose_dist.data.batch import OUTSIDE_CM, TALLEST_CM, Batch
from geopose_dist.data.deferred import Deferred, Raising, Toning
from geopose_dist.geometry import direction
from geopose_dist.model.line_of_sight import invert_flow


def finish(batch: Batch) -> Batch:
    """The batch with its augmentation done where its tensors are; the same batch if none was left to do.

    Returns rgb uint8 [B, 3, h, w] in channels-last memory and agl_cm int32 [B, 1, h, w] with the markers of `Batch`.
    """
    if batch.deferred is None:
        return batch
    deferred, agl_cm = batch.deferred, batch.agl_cm[:, 0].to(torch.int32)
    row, col = _places(deferred, agl_cm.device)
    sides = [(*one.tile, *one.origin, *one.part) for one in deferred]
    limits = _numbers(sides, agl_cm.device, torch.float64)[:, :, None, None]
    moved = _moved(deferred, agl_cm, row, col, limits)
    if moved is not None:
        ways = [(0.0, 0.0) if d.raising is None else direction(d.raising.angle_rad) for d in deferred]
        way = _numbers(ways, agl_cm.device, torch.float64)[:, :, None, None]
        row, col = row + way[:, 1] * moved, col + way[:, 0] * moved
    row_at, col_at, outside = _inside(row, col, limits)
    pixels = _Pixels.at(row_at, col_at, limits)
    heights = _heights(deferred, agl_cm, pixels, moved)
    heights = heights.masked_fill(outside, OUTSIDE_CM)
    outside = heights == OUTSIDE_CM
    rgb = _colours(batch.rgb.permute(0, 2, 3, 1).contiguous(), pixels)
    rgb = _toned(rgb, [one.toning for one in deferred])
    rgb = rgb.masked_fill(outside[..., None], 0)
    return dataclasses.replace(batch, rgb=rgb.permute(0, 3, 1, 2), agl_cm=heights[:, None], deferred=None)


def _numbers(values: object, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A few numbers of the host on the device, without waiting for it."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def _places(deferred: list[Deferred], device: torch.device) -> tuple[Tensor, Tensor]:
    """(row, column) in its tile for every output pixel, each float64 [B, h, w]."""
    rows, cols = deferred[0].size
    m = _numbers([one.matrix for one in deferred], device, torch.float64)[..., None, None]
    down = torch.arange(rows, dtype=torch.float64, device=device)[:, None]
    right = torch.arange(cols, dtype=torch.float64, device=device)
    row, col = (m[:, i, 0] * down + m[:, i, 2] + m[:, i, 1] * right for i in (0, 1))
    return row, col


def _inside(row: Tensor, col: Tensor, limits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Places kept to the part, and which were outside the tile; half a pixel around it still is image, NaN is not.

    `limits` [B, 6, 1, 1]: rows and columns of the tile, first of the part, and how many of the part.
    """
    high, wide, top, left, rows, cols = limits.unbind(1)
    within = (row >= -0.5) & (row < high - 0.5) & (col >= -0.5) & (col < wide - 0.5)
    row_at = torch.minimum(torch.maximum(row.nan_to_num(0.0), top), top + rows - 1)
    col_at = torch.minimum(torch.maximum(col.nan_to_num(0.0), left), left + cols - 1)
    return row_at, col_at, ~within


@dataclasses.dataclass(frozen=True)
class _Pixels:
    """Where each output pixel reads.

    Attributes:
        top, left, bottom, right: rows and columns of its four neighbours in the part, int64 [B, h, w].
        down, across: weights of bottom and right, of 128, int32 [B, h, w].
    """

    top: Tensor
    left: Tensor
    bottom: Tensor
    right: Tensor
    down: Tensor
    across: Tensor

    @classmethod
    def at(cls, row: Tensor, col: Tensor, limits: Tensor) -> _Pixels:
        """The neighbours of places inside their parts."""
        sides = []
        for place, start, count in ((row, limits[:, 2], limits[:, 4]), (col, limits[:, 3], limits[:, 5])):
            first = place.floor()
            weight = ((place - first) * 128 + 0.5).floor().to(torch.int32)
            first = first - start
            sides.append((first.long(), torch.minimum(first + 1, count - 1).long(), weight))
        (top, bottom, down), (left, right, across) = sides
        return cls(top, left, bottom, right, down, across)

    @property
    def nearest(self) -> tuple[Tensor, Tensor]:
        """Row and column of the nearest of the four; of equals the later."""
        return (
            torch.where(self.down >= 64, self.bottom, self.top),
            torch.where(self.across >= 64, self.right, self.left),
        )


def _moved(
    deferred: list[Deferred], agl_cm: Tensor, row: Tensor, col: Tensor, limits: Tensor
) -> Tensor | None:
    """How far along the flow what each output pixel shows has come, float32 [B, h, w]; None if nothing is raised.

    0 in samples that are not raised; NaN where the place or its line of sight is outside.
    """
    if not any(one.raising for one in deferred):
        return None
    moved = torch.zeros_like(row, dtype=torch.float32)
    for i, one in enumerate(deferred):
        if one.raising is not None:
            shift = _shift(agl_cm[i, : one.part[0], : one.part[1]], one.raising, one.origin)
            its = limits[i : i + 1]
            row_at, col_at, outside = _inside(row[i : i + 1], col[i : i + 1], its)
            near = _Pixels.at(row_at, col_at, its).nearest
            moved[i] = shift[near[0][0], near[1][0]].masked_fill(outside[0], math.nan)
    return moved


def _shift(agl_cm: Tensor, raising: Raising, origin: tuple[int, int]) -> Tensor:
    """Shift of the surface seen at each pixel of a part after its heights were raised."""
    agl_m = (agl_cm / 100).masked_fill(agl_cm >= OUTSIDE_CM, math.nan)
    return invert_flow(
        agl_m, raising.px_per_m, raising.angle_rad, raising.facade_px_per_px, raising.tallest_m, origin
    )


def _heights(deferred: list[Deferred], agl_cm: Tensor, pixels: _Pixels, moved: Tensor | None) -> Tensor:
    """Height of the nearest pixel, int32 [B, h, w]; where raised and known, what moved so far is so high."""
    sample = torch.arange(len(agl_cm), device=agl_cm.device)[:, None, None]
    heights = agl_cm[sample, *pixels.nearest]
    if moved is None:
        return heights
    per_shift = [0.0 if one.raising is None else one.raising.agl_per_shift for one in deferred]
    new = moved * _numbers(per_shift, agl_cm.device, torch.float32)[:, None, None] * 100
    new_cm = new.nan_to_num(0.0).round().clamp(0, TALLEST_CM).to(torch.int32)
    raised = _numbers([one.raising is not None for one in deferred], agl_cm.device, torch.bool)
    return torch.where(raised[:, None, None] & (heights < OUTSIDE_CM), new_cm, heights)


def _colours(rgb: Tensor, pixels: _Pixels) -> Tensor:
    """Bilinear colours uint8 [B, h, w, 3] of rgb uint8 [B, H, W, 3], in whole numbers as the kernel has them."""
    batch, high, wide, _ = rgb.shape
    flat = rgb.view(-1, 3)
    sample = torch.arange(batch, device=rgb.device)[:, None, None] * (high * wide)
    across = pixels.across.to(torch.int16)[..., None]  # at most 255 * 128, which int16 holds

    def line(row: Tensor) -> Tensor:
        start = sample + row * wide
        left, right = flat[start + pixels.left], flat[start + pixels.right]
        return (left * (128 - across) + right * across).to(torch.int32)

    down = pixels.down[..., None]
    mixed = line(pixels.top) * (128 - down)
    mixed += line(pixels.bottom) * down
    return ((mixed + 8192) >> 14).to(torch.uint8)


def _toned(rgb: Tensor, toning: list[Toning | None]) -> Tensor:
    """rgb uint8 [B, h, w, 3] with each sample's colours looked up in its table and its noise added."""
    if not any(toning):
        return rgb
    same = torch.arange(256, dtype=torch.uint8).expand(3, 256)
    tables = torch.stack([same if one is None else torch.from_numpy(one.table) for one in toning])
    flat = tables.flatten().to(rgb.device, non_blocking=True)
    first = torch.arange(len(toning) * 3, device=rgb.device, dtype=torch.int32).view(-1, 1, 1, 3) * 256
    out = flat[first + rgb]
    for i, one in enumerate(toning):
        if one is not None and one.noise is not None:
            out[i] = _noisy(out[i], one)
    return out


def _noisy(rgb: Tensor, toning: Toning) -> Tensor:
    """Noise of the distribution that a worker adds; the random bytes are those of this kind of device."""
    generator = torch.Generator(rgb.device).manual_seed(toning.noise_seed)
    random = torch.randint(0, 256, rgb.shape, dtype=torch.int32, generator=generator, device=rgb.device)
    noise = torch.from_numpy(toning.noise).to(torch.int16).to(rgb.device, non_blocking=True)
    return (rgb + noise[random]).clamp(0, 255).to(torch.uint8)
