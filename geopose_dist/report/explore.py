"""`geopose explore`: a dataset in one page: counts, label ranges, heights by city, example panels.

Worker processes read each height and label file once and give back small sums: counts by decimetre, whose
merging gives exact means and quantiles to a decimetre for a dataset of any size. Images are decoded only for
the examples. What is wrong with the dataset stands on the page, by file, and the exit code is 1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from geopose_dist import metrics_log
from geopose_dist.errors import FinishedWithFailures, UserError
from geopose_dist.geometry import zenith_from_scale
from geopose_dist.pool import process_map
from geopose_dist.report import page

if TYPE_CHECKING:
    from shards.layouts import Tile

MAX_CITIES = 8
"""Curves of so many cities can be told apart; the tables show all."""
BINS_PER_M = 10
BINS = 656 * BINS_PER_M
"""Up to the tallest height that a uint16 file holds."""


@dataclass(frozen=True)
class ExploreRecipe:
    """What to look at, and where to write what was seen."""

    source: Path
    """Dataset: the challenge's layout, the US3D release, or a plain folder."""
    out: Path
    """The page, one HTML file."""
    examples: int = 2
    """Tiles of each city that are shown."""
    workers: int = 0
    """Processes that read tiles; 0: one per core."""

    def __post_init__(self) -> None:
        if self.examples < 0 or self.workers < 0:
            raise ValueError(f"examples {self.examples} and workers {self.workers} must not be negative")


@dataclass(frozen=True)
class Look:
    """What reading one tile told.

    Attributes:
        tile: the files.
        counts: pixels by decimetre of height, int64 [BINS]; None without heights.
        unknown: pixels without a height.
        sum_m: sum of known heights, metres.
        top_m: tallest known height.
        pose: scale (px/m) and angle (radians), if labelled.
        panels: HTML of an example, else empty.
        problem: why the tile could not be read, else empty.
    """

    tile: Tile
    counts: npt.NDArray[np.int64] | None = None
    unknown: int = 0
    sum_m: float = 0.0
    top_m: float = 0.0
    pose: tuple[float, float] | None = None
    panels: str = ""
    problem: str = ""


def run(recipe: ExploreRecipe) -> None:
    """Write the page (UserError if there is no dataset; FinishedWithFailures if some files are wrong)."""
    from shards.layouts import scan

    layout = scan(recipe.source)
    shown = _examples(layout.tiles, recipe.examples)
    jobs = [(tile, tile.key in shown) for tile in layout.tiles]
    looks = list(
        metrics_log.track(
            process_map(look, jobs, workers=min(recipe.workers, len(jobs))), total=len(jobs), label="explore"
        )
    )
    problems = [problem.sentence for problem in layout.problems] + [
        seen.problem for seen in looks if seen.problem
    ]
    page.write(recipe.out, f"Dataset {recipe.source.resolve().name}", _parts(looks, problems))
    print(recipe.out)
    if problems:
        raise FinishedWithFailures("\n  ".join([f"{len(problems)} problems in {recipe.source}:", *problems]))


def _examples(tiles: Sequence[Tile], each: int) -> set[str]:
    """Keys of tiles to show: spread over the sorted labelled tiles of each of the first cities."""
    by_city: dict[str, list[str]] = defaultdict(list)
    for tile in tiles:
        if tile.agl and tile.vflow:
            by_city[tile.city].append(tile.key)
    return {
        keys[(2 * i + 1) * len(keys) // (2 * each)]
        for keys in [by_city[city] for city in sorted(by_city)][:MAX_CITIES]
        for i in range(each)
    }


def look(job: tuple[Tile, bool]) -> Look:
    """Read the labels of one tile, and draw it if it is an example."""
    from shards import layouts

    tile, is_example = job
    try:
        pose, agl_m = layouts.load_pose(tile), layouts.load_agl_m(tile)
        if agl_m is None:
            return Look(tile, pose=pose)
        panels = _panels(tile, agl_m, pose) if is_example and pose else ""
    except UserError as error:
        return Look(tile, problem=str(error))
    known = agl_m[np.isfinite(agl_m)]
    bins = np.clip(known * BINS_PER_M, 0, BINS - 1).astype(np.int64)
    return Look(
        tile,
        counts=np.bincount(bins, minlength=BINS),
        unknown=agl_m.size - known.size,
        sum_m=float(known.sum(dtype=np.float64)),
        top_m=float(known.max()) if known.size else 0.0,
        pose=pose,
        panels=panels,
    )


def _panels(tile: Tile, agl_m: npt.NDArray[np.float32], pose: tuple[float, float]) -> str:
    from geopose_dist.geometry import Pose
    from geopose_dist.report import panels
    from shards.layouts import load_rgb

    rgb = load_rgb(tile)
    if rgb.shape[:2] != agl_m.shape:
        raise UserError(
            f"{tile.agl}: {agl_m.shape} pixels, its image has {rgb.shape[:2]}; one of them is wrong"
        )
    return panels.labelled(rgb, panels.Surface(agl_m, Pose(pose[1], pose[0], tile.gsd_m)))


def quantile_m(counts: npt.NDArray[np.int64], share: float) -> float:
    """Height below which `share` of the counted pixels lie, to a decimetre; NaN without pixels."""
    total = int(counts.sum())
    if total == 0:
        return math.nan
    return (int(np.searchsorted(np.cumsum(counts), share * total, side="left")) + 0.5) / BINS_PER_M


def _parts(looks: Sequence[Look], problems: Sequence[str]) -> list[str]:
    by_city: dict[str, list[Look]] = defaultdict(list)
    for seen in looks:
        by_city[seen.tile.city].append(seen)
    cities = {city: by_city[city] for city in sorted(by_city)}
    parts = [page.paragraph(f"{len(looks)} tiles of {len(cities)} cities.")]
    if problems:
        parts.append(page.folded(f"{len(problems)} problems", "\n".join(problems)))
    parts += [page.heading("Tiles and labels"), _label_table(cities)]
    parts.append(
        page.note(
            "Scale and GSD: smallest to largest. The elevation follows from the two for an affine camera."
        )
    )
    parts += [page.heading("Heights above ground"), _height_table(cities)]
    parts.append(
        page.note("Over all known pixels, in metres; quantiles to a decimetre. No data: share of pixels.")
    )
    charts = _charts(dict(list(cities.items())[:MAX_CITIES]))
    parts += [page.heading("Distributions"), page.grid(charts, "figures")] if charts else []
    examples = [seen for seen in looks if seen.panels]
    parts += [page.heading("Examples")] if examples else []
    for seen in examples:
        assert seen.pose is not None
        told = f"{seen.tile.key}: scale {seen.pose[0]:.3f} px/m, angle {math.degrees(seen.pose[1]):.0f} deg"
        parts += [page.heading(told, 3), seen.panels]
    return parts


def _label_table(cities: dict[str, list[Look]]) -> str:
    rows = []
    for city, looks in cities.items():
        tiles = [seen.tile for seen in looks]
        places = {tile.place for tile in tiles if tile.place}
        posed = [(seen.pose[0], seen.tile.gsd_m) for seen in looks if seen.pose]
        elevations = [90 - math.degrees(zenith_from_scale(scale, gsd)) for scale, gsd in posed if gsd]
        rows.append(
            [
                city,
                len(tiles),
                sum(1 for tile in tiles if tile.agl and tile.vflow),
                len(places) or "-",
                _span([tile.gsd_m for tile in tiles if tile.gsd_m], 3),
                _span([scale for scale, _ in posed], 3),
                _span(elevations, 0),
            ]
        )
    headings = ["city", "tiles", "labelled", "places", "GSD, m", "scale, px/m", "elevation, deg"]
    return page.table(headings, rows)


def _span(numbers: Sequence[float], digits: int) -> str:
    return f"{min(numbers):.{digits}f} to {max(numbers):.{digits}f}" if numbers else "-"


def _height_table(cities: dict[str, list[Look]]) -> str:
    rows = []
    for city, looks in cities.items():
        counts = _counts(looks)
        known, unknown = int(counts.sum()), sum(seen.unknown for seen in looks)
        if known + unknown == 0:
            continue
        mean = sum(seen.sum_m for seen in looks) / known if known else math.nan
        quantiles = [quantile_m(counts, share) for share in (0.25, 0.5, 0.75, 0.99)]
        top = max(seen.top_m for seen in looks)
        numbers = [f"{number:.2f}" for number in (mean, *quantiles, top)]
        rows.append([city, *numbers, f"{unknown / (known + unknown):.1%}"])
    return page.table(["city", "mean", "25 %", "median", "75 %", "99 %", "tallest", "no data"], rows)


def _counts(looks: Sequence[Look]) -> npt.NDArray[np.int64]:
    total = np.zeros(BINS, np.int64)
    for seen in looks:
        if seen.counts is not None:
            total += seen.counts
    return total


def _charts(cities: dict[str, list[Look]]) -> list[str]:
    """Histograms of scale, direction and height by city."""
    from geopose_dist.report import figures

    poses = {city: [seen.pose for seen in looks if seen.pose] for city, looks in cities.items()}
    scales: dict[str, list[float]] = {
        city: [pose[0] for pose in found] for city, found in poses.items() if found
    }
    charts = []
    if scales:
        every = np.concatenate([np.asarray(found) for found in scales.values()])
        edges = np.linspace(0, float(every.max()) * 1.02, 31)
        charts.append(_by_city(scales, edges, "Scale", "scale, px/m"))
        angles = {city: [math.degrees(pose[1]) for pose in found] for city, found in poses.items() if found}
        charts.append(_by_city(angles, np.arange(0, 361, 15.0), "Direction of the flow", "angle, degrees"))
    heights: dict[str, npt.NDArray[Any]] = {}
    for city, looks in cities.items():
        counts = _counts(looks)
        if counts.any():
            heights[city] = counts.reshape(-1, 2 * BINS_PER_M).sum(axis=1) / counts.sum()
    if heights:
        last = 1 + max(int(np.flatnonzero(shares)[-1]) for shares in heights.values())
        charts.append(
            figures.histogram(
                {city: shares[:last] for city, shares in heights.items()},
                np.arange(last + 1) * 2.0,
                title="Height above ground",
                x_label="height, m (bins of 2 m)",
                y_label="share of known pixels",
                log_y=True,
            )
        )
    return [page.drawing(svg) for svg in charts]


def _by_city(values: dict[str, list[float]], edges: npt.NDArray[Any], title: str, x_label: str) -> str:
    from geopose_dist.report import figures

    counts = {city: np.histogram(found, edges)[0] for city, found in values.items()}
    return figures.histogram(counts, edges, title=title, x_label=x_label, y_label="tiles")
