"""What is kept of a dataset while its tiles are read: sums by city, examples, problems.

`look` opens each height and label file of a tile once, and its image only if the tile is an example. Heights are
counted by decimetre, so merging gives exact means, and quantiles to a decimetre, for any number of tiles.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from geopose_dist.errors import UserError

if TYPE_CHECKING:
    from geopose_dist.report.panels import Row
    from shards.layouts import Tile

BINS_PER_M = 10
BINS = 656 * BINS_PER_M
"""Up to the tallest height that a uint16 file holds."""


@dataclass(frozen=True)
class Look:
    """What reading one tile told.

    Attributes:
        tile: the files.
        counts: pixels by decimetre of height up to the tallest, int64; None without heights.
        unknown: pixels without a height.
        sum_m: sum of known heights, metres.
        top_m: tallest known height.
        pose: scale (px/m) and angle (radians), if labelled.
        row: pictures of an example, else None.
        problem: why the tile could not be read, else empty.
    """

    tile: Tile
    counts: npt.NDArray[np.int64] | None = None
    unknown: int = 0
    sum_m: float = 0.0
    top_m: float = 0.0
    pose: tuple[float, float] | None = None
    row: Row | None = None
    problem: str = ""


@dataclass
class City:
    """Sums over the tiles of a city; only scale, angle and GSD are kept by tile.

    Attributes:
        tiles, labelled: how many there are, and how many of them have heights and a pose.
        places: names of the places that are known.
        gsds_m: of tiles whose GSD is known.
        poses: (scale px/m, angle rad, GSD m or None) of tiles with a pose.
        counts: pixels by decimetre of height.
        unknown: pixels without a height.
        sum_m: sum of known heights.
        top_m: the tallest.
    """

    tiles: int = 0
    labelled: int = 0
    places: set[str] = field(default_factory=set)
    gsds_m: list[float] = field(default_factory=list)
    poses: list[tuple[float, float, float | None]] = field(default_factory=list)
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    unknown: int = 0
    sum_m: float = 0.0
    top_m: float = 0.0

    def add(self, seen: Look) -> None:
        """Take in one tile."""
        tile = seen.tile
        self.tiles += 1
        self.labelled += bool(tile.agl and tile.vflow)
        self.places |= {tile.place} if tile.place else set()
        self.gsds_m += [tile.gsd_m] if tile.gsd_m else []
        self.poses += [(*seen.pose, tile.gsd_m)] if seen.pose else []
        if seen.counts is not None:
            self.counts[: len(seen.counts)] += seen.counts
            self.unknown += seen.unknown
            self.sum_m += seen.sum_m
            self.top_m = max(self.top_m, seen.top_m)


@dataclass
class Tally:
    """What is kept of a dataset while its tiles are read: cities, examples, problems."""

    cities: dict[str, City] = field(default_factory=lambda: defaultdict(City))
    examples: list[Look] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, seen: Look) -> None:
        """Take in one tile."""
        self.cities[seen.tile.city].add(seen)
        self.examples += [seen] if seen.row else []
        self.problems += [seen.problem] if seen.problem else []


def look(job: tuple[Tile, bool, int]) -> Look:
    """Read the labels of one tile, and draw it if it is an example: (tile, is it one, side in px or 0)."""
    from shards import layouts

    tile, is_example, side = job
    try:
        agl_m, pose = layouts.load_labels(tile)
        if agl_m is None:
            return Look(tile, pose=pose)
        row = _row(tile, agl_m, pose, side) if is_example and pose else None
    except UserError as error:
        return Look(tile, problem=str(error))
    known = agl_m[np.isfinite(agl_m)]
    bins = np.clip(known * BINS_PER_M, 0, BINS - 1).astype(np.int64)
    return Look(
        tile,
        counts=np.bincount(bins),
        unknown=agl_m.size - known.size,
        sum_m=float(known.sum(dtype=np.float64)),
        top_m=float(known.max()) if known.size else 0.0,
        pose=pose,
        row=row,
    )


def _row(tile: Tile, agl_m: npt.NDArray[np.float32], pose: tuple[float, float], side: int) -> Row:
    from geopose_dist.geometry import Pose
    from geopose_dist.report import panels
    from shards.layouts import load_rgb

    rgb = load_rgb(tile)
    if rgb.shape[:2] != agl_m.shape:
        raise UserError(
            f"{tile.agl}: {agl_m.shape} pixels, its image has {rgb.shape[:2]}; one of them is wrong"
        )
    surface = panels.Surface(agl_m, Pose(pose[1], pose[0], tile.gsd_m))
    return panels.labelled(rgb, surface, side or panels.SIDE_PX)


def quantile_m(counts: npt.NDArray[np.int64], share: float) -> float:
    """Height below which `share` of the counted pixels lie, to a decimetre; NaN without pixels."""
    total = int(counts.sum())
    if total == 0:
        return math.nan
    return (int(np.searchsorted(np.cumsum(counts), share * total, side="left")) + 0.5) / BINS_PER_M
