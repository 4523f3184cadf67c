"""Which predicted tiles a page shows, and their panels: best, median and worst of each city.

Tiles are ranked by their mean endpoint error, which height, scale and angle all enter, from the sums of the
official score. Worker processes read every predicted tile once to rank it, and images only of those shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from geopose_dist import metrics_log
from geopose_dist.errors import UserError
from geopose_dist.evaluate.moments import tile_moments
from geopose_dist.evaluate.predictions import TileFiles, list_folder
from geopose_dist.evaluate.rectify import read_pose
from geopose_dist.geometry import Pose
from geopose_dist.pool import process_map
from geopose_dist.report import page, panels
from shards.layouts import Tile, load_rgb, read_layout

MAX_CITIES = 6
"""Tiles of so many cities are shown; the page should stay small."""


@dataclass(frozen=True)
class Candidate:
    """A predicted tile with its truth and its image."""

    key: str
    prediction: TileFiles
    truth: TileFiles
    image: Tile


@dataclass(frozen=True)
class Measured:
    """Errors of one tile: mean endpoint error (px), RMS height error (m), angle (degrees), scale (px/m)."""

    key: str
    city: str
    endpoint_px: float
    height_rms_m: float
    angle_deg: float
    scale_px_per_m: float


def tiles_part(source: Path, predictions: Path, truth: Path, workers: int) -> list[str]:
    """Best, median and worst tile of each city as panels of a page."""
    count, shown = ranked_rows(source, predictions, truth, workers)
    parts = [
        page.heading("Tiles"),
        page.note(
            f"Of {count} predicted tiles, by mean endpoint error in their city. The endpoint of the "
            "flow is where a surface pixel stands on the ground, so its error holds those of height, scale "
            "and angle. Drag the cut of the rectified pair."
        ),
    ]
    for rank, tile, row in shown:
        errors = (
            f"errors: endpoint {tile.endpoint_px:.2f} px, height {tile.height_rms_m:.2f} m (RMS), "
            f"angle {tile.angle_deg:.1f} deg, scale {tile.scale_px_per_m:.4f} px/m"
        )
        parts += [page.heading(f"{tile.city}, {rank}: {tile.key}", 3), page.note(errors), row.html()]
    return parts


def ranked_rows(
    source: Path, predictions: Path, truth: Path, workers: int, side: int = panels.SIDE_PX
) -> tuple[int, list[tuple[str, Measured, panels.Row]]]:
    """How many tiles were ranked, and (rank, tile, pictures of `side` px) of those to show."""
    candidates = _candidates(source, predictions, truth)
    measured = list(
        metrics_log.track(
            process_map(_measure, candidates, workers=min(workers, len(candidates))),
            total=len(candidates),
            label="rank tiles",
        )
    )
    shown = picked(measured)
    by_key = {candidate.key: candidate for candidate in candidates}
    jobs = [(by_key[tile.key], side) for _, tile in shown]
    drawn = metrics_log.track(
        process_map(_draw, jobs, workers=min(workers, len(shown))), total=len(shown), label="draw tiles"
    )
    return len(measured), [(rank, tile, row) for (rank, tile), row in zip(shown, drawn, strict=True)]


def picked(measured: Sequence[Measured]) -> list[tuple[str, Measured]]:
    """(rank, tile) of the best, median and worst tile of each of the first cities, each tile once."""
    chosen: list[tuple[str, Measured]] = []
    for city in sorted({tile.city for tile in measured})[:MAX_CITIES]:
        ranked = sorted(
            (tile for tile in measured if tile.city == city), key=lambda t: (t.endpoint_px, t.key)
        )
        last = len(ranked) - 1
        # Of two tiles there is no median, and of one no worst.
        names = {last // 2: "median", last: "worst", 0: "best"} if last > 1 else {last: "worst", 0: "best"}
        chosen += [(names[place], ranked[place]) for place in sorted(names)]
    return chosen


def _candidates(source: Path, predictions: Path, truth: Path) -> list[Candidate]:
    """Tiles that have a prediction, a truth and an image (UserError if there is none)."""
    predicted, true = list_folder(predictions, "--predictions"), list_folder(truth, "--truth")
    images = {tile.key: tile for tile in read_layout(source)}
    found = [
        Candidate(key, tile, true.tiles[key], images[key])
        for key, tile in predicted.tiles.items()
        if key in true.tiles and key in images
    ]
    complete = [c for c in found if all((c.prediction.agl, c.prediction.vflow, c.truth.agl, c.truth.vflow))]
    if not complete:
        raise UserError(
            f"no tile has an image in {source}, a prediction in {predictions} and a truth in {truth}; they "
            f"hold {len(images)} images, {len(predicted.tiles)} predictions, {len(true.tiles)} true tiles"
        )
    return complete


def _measure(candidate: Candidate) -> Measured:
    """Errors of one tile, by the sums of the official score."""
    predicted, true = _surfaces(candidate)
    sums = tile_moments(
        candidate.truth.city,
        predicted.agl_m,
        predicted.pose.scale_px_per_m,
        predicted.pose.angle_rad,
        true.agl_m,
        true.pose.scale_px_per_m,
        true.pose.angle_rad,
    )
    known = max(sums["known"], 1.0)
    return Measured(
        key=candidate.key,
        city=candidate.truth.city,
        endpoint_px=sums["sum_epe"] / known,
        height_rms_m=math.sqrt(sums["sse_agl"] / known),
        angle_deg=sums["angle_deg"],
        scale_px_per_m=sums["scale"],
    )


def _draw(job: tuple[Candidate, int]) -> panels.Row:
    """The pictures of one tile."""
    candidate, side = job
    predicted, true = _surfaces(candidate)
    rgb = load_rgb(candidate.image)
    if rgb.shape[:2] != predicted.agl_m.shape:
        raise UserError(
            f"{candidate.image.rgb}: {rgb.shape[:2]} pixels, its prediction has {predicted.agl_m.shape}; "
            "they belong to different tiles; predict again"
        )
    return panels.compared(rgb, true, predicted, side)


def _surfaces(candidate: Candidate) -> tuple[panels.Surface, panels.Surface]:
    """Prediction and truth of one tile."""
    surfaces = []
    for tile in (candidate.prediction, candidate.truth):
        assert tile.agl is not None
        assert tile.vflow is not None
        agl_m, scale_px_per_m, angle_rad = read_pose(tile.agl, tile.vflow)
        surfaces.append(panels.Surface(agl_m, Pose(angle_rad, scale_px_per_m)))
    predicted, true = surfaces
    if predicted.agl_m.shape != true.agl_m.shape:
        raise UserError(
            f"{candidate.prediction.agl}: size {predicted.agl_m.shape}; its truth has {true.agl_m.shape}; "
            "predict again"
        )
    return predicted, true
