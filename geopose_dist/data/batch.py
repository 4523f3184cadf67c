"""A micro-batch on its way to the device: small bytes, few tensors.

RGB stays uint8 and heights uint16 centimetres until the device converts them: five bytes per pixel where
float32 would be sixteen. Pixels are two tensors (each costs a file descriptor between processes and a pin in
memory); the few numbers per sample travel inside the pickle. Magnitude is never shipped: it is agl * scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from geopose_dist.data.deferred import Deferred
from geopose_dist.data.sample import View
from geopose_dist.errors import UserError
from geopose_dist.kernels import planes

UNKNOWN_CM = 65535
OUTSIDE_CM = 65534
TALLEST_CM = 65533
STEP_PX = 32
"""Sides of padded parts are multiples of this."""


@dataclass(frozen=True)
class Substitution:
    """A damaged sample that another one stands in for: where, which, why, and who stands in."""

    position: int
    key: str
    reason: str
    replaced_by: str


@dataclass(frozen=True)
class Batch:
    """B samples, equally large.

    Attributes:
        rgb: uint8 [B, 3, H, W], in channels-last memory.
        agl_cm: uint16 [B, 1, H, W]; 65535 = unknown, 65534 = outside the image, heights clip at 65533.
        gsd_m: float32 [B], NaN = unknown.
        scale_px_per_m: float32 [B], NaN = no pose label.
        direction: float32 [B, 2] (sin, cos) of the angle, NaN = no pose label.
        city: int64 [B], position in the manifest's cities.
        keys: name of each sample.
        positions: place of each sample in the stream (in the split, for evaluation).
        visits: how often the stream had gone through the samples before.
        substitutions: what was replaced in this batch because of damage.
        deferred: by sample, the augmentation that the device still has to do; None where nothing is left.
            Labels are already those after it; pixels are parts of tiles, padded to one size.
    """

    rgb: torch.Tensor
    agl_cm: torch.Tensor
    gsd_m: torch.Tensor
    scale_px_per_m: torch.Tensor
    direction: torch.Tensor
    city: torch.Tensor
    keys: list[str]
    positions: list[int]
    visits: list[int]
    substitutions: list[Substitution] = dataclasses.field(default_factory=list)
    deferred: list[Deferred] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __reduce__(self) -> tuple[Any, ...]:
        return Batch.of, (self.rgb, self.agl_cm, *self.small())

    def small(self) -> tuple[list[npt.NDArray[Any]], tuple[Any, ...]]:
        """Everything but the pixels, as it travels inside a pickle; `of` puts it together again."""
        small = (self.gsd_m, self.scale_px_per_m, self.direction, self.city)
        rest = (self.keys, self.positions, self.visits, self.substitutions, self.deferred)
        return [tensor.numpy() for tensor in small], rest

    @classmethod
    def of(
        cls, rgb: torch.Tensor, agl_cm: torch.Tensor, small: list[npt.NDArray[Any]], rest: tuple[Any, ...]
    ) -> Batch:
        """A batch from its pixels and what `small` gave."""
        gsd_m, scale_px_per_m, direction, city = (torch.from_numpy(array) for array in small)
        return cls(rgb, agl_cm, gsd_m, scale_px_per_m, direction, city, *rest)

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory, from which copies to a GPU overlap with its work."""
        return dataclasses.replace(self, rgb=self.rgb.pin_memory(), agl_cm=self.agl_cm.pin_memory())


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; from pinned memory without waiting for the copy."""
    names = ("rgb", "agl_cm", "gsd_m", "scale_px_per_m", "direction", "city")
    return dataclasses.replace(
        batch, **{name: getattr(batch, name).to(device, non_blocking=True) for name in names}
    )


def pack(
    views: Sequence[View],
    cities: Sequence[str],
    positions: Sequence[int],
    visits: Sequence[int],
    substitutions: Sequence[Substitution] = (),
    room: npt.NDArray[np.uint8] | None = None,
) -> Batch:
    """A batch of views of one size; `cities` are the manifest's (UserError: sizes differ).

    Where augmentation is left to the device, its results must be of one size; the parts shipped are padded.
    The pixels are written to `room` if there is enough, else to memory of their own.
    """
    deferred = [view.deferred for view in views if view.deferred is not None]
    assert len(deferred) in (0, len(views)), "one recipe says who augments"
    sizes = [one.size for one in deferred] or [view.rgb.shape[:2] for view in views]
    for view, size in zip(views, sizes, strict=True):
        if size != sizes[0]:
            raise UserError(
                f"{view.key} has {size[0]}x{size[1]} px, but {views[0].key} of the same "
                f"batch has {sizes[0][0]}x{sizes[0][1]}; set data.crop_px to a side that all have, or "
                "data.micro_batch 1"
            )
    rows, columns = _common_size(views) if deferred else sizes[0]
    size_bytes = pixel_bytes(len(views), rows, columns)
    if room is None or room.size < size_bytes:
        memory = _shared(size_bytes)
    else:
        memory = torch.from_numpy(room)
    rgb, agl_cm = pixels_in(memory, len(views), rows, columns)
    rgb_rows, agl_rows = rgb.permute(0, 2, 3, 1).numpy(), agl_cm.numpy()
    for i, view in enumerate(views):
        high, wide = view.rgb.shape[:2]
        rgb_rows[i, :high, :wide] = view.rgb
        write_cm(view, agl_rows[i, 0, :high, :wide])
        if (high, wide) != (rows, columns):
            for padded, fill in ((rgb_rows[i], 0), (agl_rows[i, 0], OUTSIDE_CM)):
                padded[high:] = fill
                padded[:high, wide:] = fill
    return Batch(
        rgb=rgb,
        agl_cm=agl_cm,
        gsd_m=_numbers([view.gsd_m for view in views]),
        scale_px_per_m=_numbers([view.scale_px_per_m for view in views]),
        direction=torch.tensor([_direction(view.angle_rad) for view in views], dtype=torch.float32),
        city=torch.tensor([cities.index(view.city) for view in views], dtype=torch.int64),
        keys=[view.key for view in views],
        positions=list(positions),
        visits=list(visits),
        substitutions=list(substitutions),
        deferred=deferred or None,
    )


def _common_size(views: Sequence[View]) -> tuple[int, int]:
    """The least size that holds all views; in coarse steps where they differ, so that a device's memory is reused."""
    sides = []
    for axis in (0, 1):
        lengths = {view.rgb.shape[axis] for view in views}
        sides.append(max(lengths) if len(lengths) == 1 else -(-max(lengths) // STEP_PX) * STEP_PX)
    return sides[0], sides[1]


def write_cm(view: View, out: npt.NDArray[np.uint16]) -> None:
    """Write the heights of `view` to `out` [H, W] as centimetres with the markers of `Batch.agl_cm`."""
    inside = None if view.inside is None else np.ascontiguousarray(view.inside)
    if view.agl_m is not None:
        planes.centimetres(np.ascontiguousarray(view.agl_m), out, inside, OUTSIDE_CM)
        return
    out.fill(UNKNOWN_CM)
    if inside is not None:
        planes.mark_outside(inside, OUTSIDE_CM, out)


def pixel_bytes(count: int, rows: int, columns: int) -> int:
    """Bytes that the pixels of a batch take."""
    return _agl_at(count, rows, columns) + 2 * count * rows * columns


def pixels_in(memory: torch.Tensor, count: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`Batch.rgb` and `Batch.agl_cm` as they lie in `memory`, uint8 [pixel_bytes or more]."""
    start, pixels = _agl_at(count, rows, columns), count * rows * columns
    rgb = memory[: 3 * pixels].view(count, rows, columns, 3).permute(0, 3, 1, 2)
    agl_cm = memory[start : start + 2 * pixels].view(torch.uint16).view(count, 1, rows, columns)
    return rgb, agl_cm


def _agl_at(count: int, rows: int, columns: int) -> int:
    return -(-3 * count * rows * columns // 64) * 64


def _shared(size_bytes: int) -> torch.Tensor:
    """Memory for a batch, shared if this is a loader worker: saves a copy."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(size_bytes, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(size_bytes)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size_bytes,))  # type: ignore[call-overload,no-any-return]


def _numbers(values: list[float | None]) -> torch.Tensor:
    return torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float32)


def _direction(angle_rad: float | None) -> tuple[float, float]:
    return (math.nan, math.nan) if angle_rad is None else (math.sin(angle_rad), math.cos(angle_rad))
