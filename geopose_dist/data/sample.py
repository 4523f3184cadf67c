"""The contract of a sample: what a tile is in a shard, in a worker, and on its way to the device.

In a shard, a sample is three neighbouring members of a plain tar: `KEY.rgb.EXT`, `KEY.agl.EXT` (absent
without heights) and `KEY.json` (a `TileFacts`). In a worker it is a `View`: one tile and what is true of
it. Toward the device it is a row of a `Batch` of small bytes; magnitude is agl * scale and is computed there.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from geopose_dist.data.deferred import Deferred
from geopose_dist.errors import UserError
from geopose_dist.geometry import F32, Pose

U8 = npt.NDArray[np.uint8]

MAX_SIDE_PX = 65536
"""Larger sides in a sample's facts are refused: a decoder would be asked for gigabytes (decompression bomb)."""


@dataclass(frozen=True)
class TileFacts:
    """What is known of a tile besides its pixels; `KEY.json` of a shard, field by field.

    Attributes:
        city: text before the first underscore of the tile's name, such as JAX.
        place: name of the ground that several views share, if known.
        gsd_m: ground metres per pixel of the pixels stored, if known.
        scale_px_per_m: flow pixels per metre of height, of the pixels stored; None for unlabelled tiles.
        angle_rad: flow direction in [0, 2 pi); None for unlabelled tiles.
        size: rows and columns of the pixels stored.
        tallest_m: tallest known height, 0 if none is known; None without heights, and in shards of before it was told.
        unknown_px: how many heights are unknown; told together with `tallest_m`.
    """

    city: str
    place: str | None
    gsd_m: float | None
    scale_px_per_m: float | None
    angle_rad: float | None
    size: tuple[int, int]
    tallest_m: float | None = None
    unknown_px: int | None = None

    def to_json(self) -> bytes:
        """UTF-8 JSON with sorted keys: the same facts give the same bytes."""
        facts = dict(self.__dict__, size=list(self.size))
        if self.tallest_m is None:
            del facts["tallest_m"], facts["unknown_px"]
        return json.dumps(facts, sort_keys=True, allow_nan=False).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> TileFacts:
        """Parse and check a `KEY.json`; `where` names it in errors (UserError)."""
        try:
            facts: dict[str, Any] = json.loads(data)
            rows, columns = (int(side) for side in facts["size"])
            parsed = cls(
                city=str(facts["city"]),
                place=_optional(str, facts.get("place")),
                gsd_m=_optional(float, facts.get("gsd_m")),
                scale_px_per_m=_optional(float, facts.get("scale_px_per_m")),
                angle_rad=_optional(float, facts.get("angle_rad")),
                size=(rows, columns),
                tallest_m=_optional(float, facts.get("tallest_m")),
                unknown_px=_optional(int, facts.get("unknown_px")),
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(
                f"{where}: not a tile's facts ({type(error).__name__}: {error}); wanted JSON with city, place, gsd_m, "
                "scale_px_per_m, angle_rad and size; run `geopose verify --deep`, then pack again"
            ) from error
        numbers = (parsed.gsd_m, parsed.scale_px_per_m)
        if any(n is not None and not (math.isfinite(n) and n > 0) for n in numbers) or (
            parsed.angle_rad is not None and not math.isfinite(parsed.angle_rad)
        ):
            raise UserError(f"{where}: gsd_m, scale_px_per_m or angle_rad is not usable: {data[:300]!r}")
        if not all(0 < side <= MAX_SIDE_PX for side in parsed.size):
            raise UserError(f"{where}: size {parsed.size} is outside 1 .. {MAX_SIDE_PX}")
        if parsed.tallest_m is not None and not (math.isfinite(parsed.tallest_m) and parsed.tallest_m >= 0):
            raise UserError(f"{where}: tallest_m is {parsed.tallest_m}; wanted a finite number of at least 0")
        if (parsed.tallest_m is None) != (parsed.unknown_px is None):
            raise UserError(f"{where}: tallest_m and unknown_px are told together or not at all; pack again")
        return parsed


def _optional(kind: type, value: Any) -> Any:
    return None if value is None else kind(value)


class Window(NamedTuple):
    """A rectangle of a tile: its first row and column, and how many of each."""

    row: int
    col: int
    rows: int
    cols: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """To cut it out of an array of the tile."""
        return slice(self.row, self.row + self.rows), slice(self.col, self.col + self.cols)


@dataclass(frozen=True)
class Outline:
    """What is known of a tile before its pixels are decoded, and all that drawing its augmentation takes.

    Attributes:
        key: name of the tile.
        size: rows and columns.
        has_heights: whether it has height labels.
        pose: angle, scale and GSD, or None.
        tallest_m: tallest known height; 0 without one.
        all_known: whether no height is unknown.
    """

    key: str
    size: tuple[int, int]
    has_heights: bool
    pose: Pose | None
    tallest_m: float
    all_known: bool


@dataclass(frozen=True)
class Part:
    """Which part of a tile a view holds, if it does not hold all of it.

    Attributes:
        window: where in the tile the view's pixels lie.
        size: rows and columns of the tile.
        tallest_m: tallest known height of the tile, not only of the part.
    """

    window: Window
    size: tuple[int, int]
    tallest_m: float


@dataclass(frozen=True)
class View:
    """One tile and what is true of it.

    Attributes:
        key: name of the tile.
        city: see `TileFacts`.
        rgb: uint8 [H, W, 3].
        agl_m: float32 [H, W] metres, NaN = unknown; None without height labels.
        gsd_m: ground metres per pixel, if known.
        scale_px_per_m: None without pose label.
        angle_rad: None without pose label.
        inside: bool [H, W], False where augmentation left padding instead of image; None = all inside.
        place: see `TileFacts`.
        deferred: augmentation left to the device: pixels are those before it, labels those after.
        part: where in its tile a view lies that was read for one crop; None = the pixels are the whole tile.
    """

    key: str
    city: str
    rgb: U8
    agl_m: F32 | None
    gsd_m: float | None
    scale_px_per_m: float | None
    angle_rad: float | None
    inside: npt.NDArray[np.bool_] | None = None
    place: str | None = None
    deferred: Deferred | None = None
    part: Part | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the tile."""
        return self.rgb.shape[:2] if self.part is None else self.part.size

    @property
    def has_heights(self) -> bool:
        """Whether there are height labels."""
        return self.agl_m is not None

    @property
    def tallest_m(self) -> float:
        """Tallest known height of the tile; 0 without one."""
        if self.part is not None:
            return self.part.tallest_m
        # Of NaN and a number, fmax gives the number.
        return 0.0 if self.agl_m is None else float(np.fmax(np.fmax.reduce(self.agl_m, axis=None), 0))

    @property
    def all_known(self) -> bool:
        """Whether no height is unknown."""
        return self.agl_m is not None and bool(np.isfinite(self.agl_m).all())

    @property
    def pose(self) -> Pose | None:
        """Angle, scale and GSD together, or None without a pose label."""
        if self.scale_px_per_m is None or self.angle_rad is None:
            return None
        return Pose(self.angle_rad, self.scale_px_per_m, self.gsd_m)
