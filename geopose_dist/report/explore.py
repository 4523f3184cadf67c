"""`geopose explore`: a dataset in one page: counts, label ranges, heights by city, example panels.

Worker processes look at the tiles (`report/dataset_sums.py`), and what they tell is merged as it comes, so memory
does not grow with the dataset. What is wrong with it stands on the page, by file, and the exit code is 1.
`--format png|pdf` writes the drawings and examples as figures for a paper.
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
from geopose_dist.errors import FinishedWithFailures
from geopose_dist.geometry import zenith_from_scale
from geopose_dist.pool import process_map
from geopose_dist.report import page, paper
from geopose_dist.report.dataset_sums import BINS_PER_M, City, Tally, look, quantile_m

if TYPE_CHECKING:
    from geopose_dist.report.figures import Plot
    from shards.layouts import Tile

MAX_CITIES = 8
"""Curves of so many cities can be told apart; the tables show all."""


@dataclass(frozen=True)
class ExploreRecipe:
    """What to look at, and where to write what was seen."""

    source: Path
    """Dataset: the challenge's layout, the US3D release, or a plain folder."""
    out: Path
    """The page, one HTML file; with --format png or pdf the folder of figures."""
    format: paper.Format = "html"
    """One page, or one file for each figure, fit for a paper."""
    examples: int = 2
    """Tiles of each city that are shown."""
    workers: int = 0
    """Processes that read tiles; 0: one per core."""

    def __post_init__(self) -> None:
        if self.examples < 0 or self.workers < 0:
            raise ValueError(f"examples {self.examples} and workers {self.workers} must not be negative")


def run(recipe: ExploreRecipe) -> None:
    """Write the page (UserError if there is no dataset; FinishedWithFailures if some files are wrong)."""
    from shards.layouts import scan

    folder = None if recipe.format == "html" else paper.Folder(recipe.out, recipe.format)
    layout = scan(recipe.source, labels=False)
    tally = Tally(problems=[problem.sentence for problem in layout.problems])
    shown = _examples(layout.tiles, recipe.examples)
    side = 0 if folder is None else paper.PICTURE_PX
    jobs = ((tile, tile.key in shown, side) for tile in layout.tiles)
    total = len(layout.tiles)
    looks = process_map(look, jobs, workers=min(recipe.workers, total))
    for seen in metrics_log.track(looks, total=total, label="explore"):
        tally.add(seen)
    tally.cities = {city: tally.cities[city] for city in sorted(tally.cities)}
    if folder is None:
        page.write(recipe.out, f"Dataset {recipe.source.resolve().name}", _parts(tally))
        print(recipe.out)
    else:
        for plot in _charts(tally.cities):
            folder.plot(plot)
        for seen in tally.examples:
            assert seen.row is not None
            folder.row(seen.row, f"example {seen.tile.key}")
        folder.tell()
    if tally.problems:
        count = f"{len(tally.problems)} problems in {recipe.source}:"
        raise FinishedWithFailures("\n  ".join([count, *tally.problems]))


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


def _parts(tally: Tally) -> list[str]:
    cities, problems = tally.cities, tally.problems
    total = sum(city.tiles for city in cities.values())
    parts = [page.paragraph(f"{total} tiles of {len(cities)} cities.")]
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
    charts = [page.drawing(plot.svg()) for plot in _charts(cities)]
    parts += [page.heading("Distributions"), page.grid(charts)] if charts else []
    if len(cities) > MAX_CITIES and charts:
        parts.append(page.note(f"The first {MAX_CITIES} cities; the tables hold all {len(cities)}."))
    if tally.examples:
        parts += [
            page.heading("Examples"),
            page.note("Spread over the sorted labelled tiles of each city. Drag the cut of the pair."),
        ]
    for seen in tally.examples:
        assert seen.pose is not None
        assert seen.row is not None
        told = f"{seen.tile.key}: scale {seen.pose[0]:.3f} px/m, angle {math.degrees(seen.pose[1]):.0f} deg"
        parts += [page.heading(told, 3), seen.row.html()]
    return parts


def _label_table(cities: dict[str, City]) -> str:
    rows = []
    for name, city in cities.items():
        elevations = [90 - math.degrees(zenith_from_scale(scale, gsd)) for scale, _, gsd in city.poses if gsd]
        rows.append(
            [
                name,
                city.tiles,
                city.labelled,
                len(city.places) or "-",
                _span(city.gsds_m, 3),
                _span([scale for scale, _, _ in city.poses], 3),
                _span(elevations, 0),
            ]
        )
    headings = ["city", "tiles", "labelled", "places", "GSD, m", "scale, px/m", "elevation, deg"]
    return page.table(headings, rows)


def _span(numbers: Sequence[float], digits: int) -> str:
    return f"{min(numbers):.{digits}f} to {max(numbers):.{digits}f}" if numbers else "-"


def _height_table(cities: dict[str, City]) -> str:
    rows = []
    for name, city in cities.items():
        known = int(city.counts.sum())
        if known + city.unknown == 0:
            continue
        mean = city.sum_m / known if known else math.nan
        quantiles = [quantile_m(city.counts, share) for share in (0.25, 0.5, 0.75, 0.99)]
        numbers = [f"{number:.2f}" for number in (mean, *quantiles, city.top_m)]
        rows.append([name, *numbers, f"{city.unknown / (known + city.unknown):.1%}"])
    return page.table(["city", "mean", "25 %", "median", "75 %", "99 %", "tallest", "no data"], rows)


def _charts(every: dict[str, City]) -> list[Plot]:
    """Histograms of scale, direction and height by city."""
    from geopose_dist.report import figures

    cities = dict(list(every.items())[:MAX_CITIES])
    posed = {name: city.poses for name, city in cities.items() if city.poses}
    charts = []
    if posed:
        largest = max(scale for poses in posed.values() for scale, _, _ in poses)
        scales = {name: [scale for scale, _, _ in poses] for name, poses in posed.items()}
        charts.append(_by_city(scales, np.linspace(0, largest * 1.02, 31), "Scale", "scale, px/m"))
        angles = {name: [math.degrees(angle) for _, angle, _ in poses] for name, poses in posed.items()}
        charts.append(_by_city(angles, np.arange(0, 361, 15.0), "Direction of the flow", "angle, degrees"))
    heights = {
        name: city.counts.reshape(-1, 2 * BINS_PER_M).sum(axis=1) / city.counts.sum()
        for name, city in cities.items()
        if city.counts.any()
    }
    if heights:
        last = 1 + max(int(np.flatnonzero(shares)[-1]) for shares in heights.values())
        charts.append(
            figures.histogram(
                {name: shares[:last] for name, shares in heights.items()},
                np.arange(last + 1) * 2.0,
                title="Height above ground",
                x_label="height, m (bins of 2 m)",
                y_label="share of known pixels",
                log_y=True,
            )
        )
    return charts


def _by_city(values: dict[str, list[float]], edges: npt.NDArray[Any], title: str, x_label: str) -> Plot:
    from geopose_dist.report import figures

    counts = {name: np.histogram(found, edges)[0] for name, found in values.items()}
    return figures.histogram(counts, edges, title=title, x_label=x_label, y_label="tiles")
