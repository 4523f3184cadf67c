"""`geopose predict --source SCENE.tif`: a georeferenced image of any size, by windows, never whole.

First all windows go through the network; then their angles and scales are fused, robustly, into the scene's one
pose; then the outputs are made block by block with that pose: heights, and on request heights and colours moved
to the ground with what is hidden, as cloud-optimised GeoTIFFs in the scene's coordinate system. A killed run goes
on with the windows that it has; a finished one does nothing.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geopose_dist import geometry, metrics_log
from geopose_dist.errors import FinishedWithFailures
from geopose_dist.evaluate import predictions
from geopose_dist.files import write_bytes
from geopose_dist.infer import raster, scene_plan
from geopose_dist.infer.bookkeeping import (
    BOOKKEEPING,
    check_same_maker,
    only_driver,
    write_failures,
    write_if_new,
)
from geopose_dist.infer.crew import Crew, device_of, open_crew
from geopose_dist.infer.dispatch import SetAside
from geopose_dist.infer.fuse import Fused, fuse
from geopose_dist.infer.geotiff import Canvas
from geopose_dist.infer.recipe import PredictRecipe
from geopose_dist.infer.scene_plan import ScenePlan
from geopose_dist.infer.scene_work import BlockItem, Report, SceneSpec, WindowItem
from geopose_dist.infer.sources import key_of


@dataclass(frozen=True)
class Outputs:
    """Files of a scene's prediction."""

    agl: Path
    vflow: Path
    flat_agl: Path
    flat_rgb: Path
    hidden: Path


def outputs(out: Path, key: str) -> Outputs:
    """Where the files of a scene go."""
    flat = out / "rectified"
    return Outputs(
        out / f"{key}_AGL.tif",
        out / f"{key}_VFLOW.json",
        flat / f"{key}_AGL.tif",
        flat / f"{key}_RGB.tif",
        flat / f"{key}_OCCLUDED.tif",
    )


def run(recipe: PredictRecipe, checkpoints: tuple[Path, ...]) -> None:
    """Predict a scene, or go on with it; windows that fail are named, exit code 1."""
    scene = raster.look(Path(recipe.source))
    if not scene.crs_wkt:
        print(
            f"predict: {scene.path.name} names no coordinate system, so its outputs have none and its GSD is unknown",
            file=sys.stderr,
        )
    key = key_of(scene.path)
    spec = _spec(recipe, checkpoints, scene, key)
    with only_driver(recipe.out):
        made: dict[str, object] = {"net": asdict(recipe.net), "unit": recipe.unit}
        check_same_maker(recipe.out, checkpoints, made, overwrite=recipe.overwrite)
        paths = outputs(recipe.out, key)
        wanted = list(asdict(paths).values()) if recipe.rectify else [paths.agl, paths.vflow]
        _begin(recipe, spec, wanted)
        if not all(path.is_file() for path in wanted):
            _predict(recipe, spec, paths)
        write_failures(recipe.out, [])
        shutil.rmtree(spec.scratch, ignore_errors=True)
    facts = json.loads(paths.vflow.read_bytes())
    print(
        f"{paths.agl}: {scene.rows} x {scene.columns} pixels; angle {math.degrees(facts['angle']):.1f} +- "
        f"{facts['angle_spread_deg']:.1f} degrees, scale {facts['scale']:.4g} +- {facts['scale_spread']:.2g} "
        f"px/{recipe.unit}, windows differ by {facts['seam_rms_m']:.2g} m (RMS) where they meet"
    )


def _spec(recipe: PredictRecipe, checkpoints: tuple[Path, ...], scene: raster.Scene, key: str) -> SceneSpec:
    from geopose_dist.model.weights import read_facts

    reduction = int(read_facts(checkpoints[0]).get("reduction", 1))
    net = recipe.net
    plan = ScenePlan(scene.rows, scene.columns, reduction, net.window, net.overlap, scene_plan.BLOCK_PX)
    return SceneSpec(
        tuple(path.resolve() for path in checkpoints),
        recipe.net,
        recipe.batch,
        scene,
        key.partition("_")[0],
        plan,
        (recipe.out / BOOKKEEPING / key / "windows").resolve(),
        recipe.unit,
        recipe.rectify,
        device_of(recipe),
        recipe.threads,
    )


def _begin(recipe: PredictRecipe, spec: SceneSpec, wanted: list[Path]) -> None:
    """Forget what another scene of this name, or the one to be overwritten, left behind."""
    stat = spec.scene.path.stat()
    facts = {
        "rows": spec.scene.rows,
        "columns": spec.scene.columns,
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "batch": recipe.batch,
        "transform": list(spec.scene.transform),
    }
    told = spec.scratch.with_name("scene.json")
    before = json.loads(told.read_bytes()) if told.is_file() else None
    if recipe.overwrite or before != facts:
        shutil.rmtree(spec.scratch, ignore_errors=True)
        for path in wanted:
            path.unlink(missing_ok=True)
    write_if_new(told, (json.dumps(facts, indent=1) + "\n").encode())


def _predict(recipe: PredictRecipe, spec: SceneSpec, paths: Outputs) -> None:
    spec.scratch.mkdir(parents=True, exist_ok=True)
    plan = spec.plan
    batches = [
        WindowItem(tuple(range(first, min(first + recipe.batch, plan.windows))))
        for first in range(0, plan.windows, recipe.batch)
    ]
    todo = [
        item
        for item in batches
        if not all(spec.is_finished(window) for window in item.windows if window is not None)
    ]
    with open_crew(recipe, spec, max(len(todo), plan.blocks)) as crew:
        _predict_windows(recipe, spec, crew, todo)
        fused, tallest_m, clipped = _gather(spec)
        scale = min(
            max(fused.scale_px_per_m * plan.reduction, recipe.net.scale_min_px_per_m),
            recipe.net.scale_max_px_per_m,
        )
        limited = scale != fused.scale_px_per_m * plan.reduction
        # Written numbers are what the outputs are made with.
        angle = geometry.wrap_angle(predictions.rounded(fused.angle_rad))
        scale = predictions.rounded(scale)
        items = [BlockItem(block, angle, scale, tallest_m) for block in range(plan.blocks)]
        seams = _make_outputs(recipe, spec, crew, items, paths)
    per = 1.0 if recipe.unit == "m" else 1 / geometry.CM_PER_M
    facts: dict[str, Any] = {
        "scale": predictions.rounded(scale * per),
        "angle": angle,
        "angle_spread_deg": predictions.rounded(fused.angle_spread_deg),
        "scale_spread": predictions.rounded(fused.scale_spread_px_per_m * plan.reduction * per),
        "scale_limited": limited,
        "windows": fused.windows,
        "heights_clipped": clipped,
        "seam_rms_m": predictions.rounded(math.sqrt(seams.seam_squares / max(seams.seam_pixels, 1))),
        "seam_max_m": predictions.rounded(seams.seam_max_m),
        "gsd_m": spec.scene.gsd_m,
    }
    write_bytes(paths.vflow, (json.dumps(facts, allow_nan=False) + "\n").encode())


def _predict_windows(recipe: PredictRecipe, spec: SceneSpec, crew: Crew, todo: list[WindowItem]) -> None:
    """All windows to the scratch folder; FinishedWithFailures naming those that are not there."""
    total = spec.plan.windows
    count = sum(len(item.windows) for item in todo)
    failures: list[tuple[str, str]] = []
    with metrics_log.Progress(total, f"windows, {crew.where}", "windows", start=total - count) as progress:
        for item, answer in crew.work.results(todo):
            failures += _failures_of(item, answer)
            progress.advance(len([window for window in item.windows if window is not None]))
    _stop_at(recipe, failures, f"{len(failures)} of {total} windows failed; the others are kept")


def _failures_of(item: WindowItem | BlockItem, answer: Report | SetAside) -> list[tuple[str, str]]:
    if isinstance(answer, SetAside):
        return [(str(item), f"{item}: set aside, {answer.reason}")]
    return [(str(item), sentence) for sentence in answer.failures]


def _stop_at(recipe: PredictRecipe, failures: list[tuple[str, str]], title: str) -> None:
    if failures:
        where = write_failures(recipe.out, failures)
        sentences = [sentence for _, sentence in failures]
        raise FinishedWithFailures(
            "\n  ".join([f"{title}; run the same command again to go on (also in {where}):", *sentences])
        )


def _gather(spec: SceneSpec) -> tuple[Fused, float, int]:
    """The scene's pose among reduced pixels, its tallest surface in metres, and the heights that were clipped."""
    facts = [json.loads(spec.window_paths(window)[1].read_bytes()) for window in range(spec.plan.windows)]
    seen = [fact for fact in facts if "vector" in fact]
    if not seen:
        return Fused(0.0, 1.0 / spec.plan.reduction, 0.0, 0.0, 0), 0.0, 0  # a scene without a single pixel
    fused = fuse(
        np.array([fact["vector"] for fact in seen]),
        np.array([fact["log_scale"] for fact in seen]),
        np.array([fact["weight"] for fact in seen]),
    )
    return fused, max(fact["tallest_m"] for fact in seen), sum(fact["clipped"] for fact in seen)


def _make_outputs(
    recipe: PredictRecipe, spec: SceneSpec, crew: Crew, items: list[BlockItem], paths: Outputs
) -> Report:
    """Blocks by the actors, files by this process; what the blocks say of seams, summed up."""
    work = spec.scratch
    kind, unknown = ("uint16", float(geometry.NO_DATA_CM)) if recipe.unit == "cm" else ("float32", math.nan)
    canvases = {"agl": Canvas(spec.scene, work, paths.agl, dtype=kind, no_data=unknown)}
    if recipe.rectify:
        canvases["flat_agl"] = Canvas(spec.scene, work, paths.flat_agl, dtype=kind, no_data=unknown)
        canvases["flat_rgb"] = Canvas(spec.scene, work, paths.flat_rgb, dtype="uint8", bands=3)
        canvases["hidden"] = Canvas(spec.scene, work, paths.hidden, dtype="uint8", resampling="nearest")
    failures: list[tuple[str, str]] = []
    seams, squares = Report(), []
    with metrics_log.Progress(len(items), f"outputs, {crew.where}", "blocks") as progress:
        for item, answer in crew.work.results(items):
            failures += _failures_of(item, answer)
            if isinstance(answer, Report) and not answer.failures:
                with np.load(spec.block_path(item.block), allow_pickle=False) as block:
                    for name, canvas in canvases.items():
                        canvas.write(*spec.plan.core(item.block), block[name])
                spec.block_path(item.block).unlink()
                seams.seam_pixels += answer.seam_pixels
                squares.append(answer.seam_squares)
                seams.seam_max_m = max(seams.seam_max_m, answer.seam_max_m)
            progress.advance()
    _stop_at(recipe, failures, f"{len(failures)} of {len(items)} blocks failed")
    for canvas in canvases.values():
        canvas.finish()
    seams.seam_squares = math.fsum(squares)  # blocks come in any order
    return seams
