"""`geopose predict --source SCENE.tif`: georeferenced images of any size, by windows, never whole.

Of each scene, first all windows go through the network; then their angles and scales are fused, robustly, into its
one pose; then the outputs are made block by block with that pose: heights, and on request heights and colours moved
to the ground with what is hidden, as cloud-optimised GeoTIFFs in the scene's coordinate system. A killed run goes
on with the windows that it has; a finished one does nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geopose_dist import geometry, metrics_log
from geopose_dist.errors import FinishedWithFailures, FoundProblems, UserError
from geopose_dist.evaluate import predictions
from geopose_dist.files import write_bytes
from geopose_dist.infer import raster, scene_plan
from geopose_dist.infer.bookkeeping import (
    BOOKKEEPING,
    check_same_maker,
    maker_of,
    only_driver,
    remember_maker,
    write_failures,
    write_if_new,
)
from geopose_dist.infer.crew import Crew, device_of, open_actors, open_crew
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


class _Failed(Exception):
    """A scene that cannot be finished: a title, and (name, sentence) of what failed."""

    def __init__(self, title: str, failures: list[tuple[str, str]]) -> None:
        super().__init__(title)
        self.title, self.failures = title, failures


def run(recipe: PredictRecipe, checkpoints: tuple[Path, ...], paths: list[Path], reduction: int) -> None:
    """Predict scenes one after another, or go on with them; what fails is named, exit code 1."""
    specs = [_spec(recipe, checkpoints, scene, reduction) for scene in _look(paths)]
    maker = maker_of(checkpoints, {"net": asdict(recipe.net), "unit": recipe.unit})
    if recipe.dry_run:
        check_same_maker(recipe.out, maker, overwrite=recipe.overwrite)
        _tell_plan(recipe, specs)
        return
    failed: dict[Path, _Failed] = {}
    with only_driver(recipe.out), contextlib.ExitStack() as stack:
        check_same_maker(recipe.out, maker, overwrite=recipe.overwrite)
        remember_maker(recipe.out, maker)
        todo = [spec for spec in specs if _begin(recipe, spec, maker)]
        if len(todo) > 1:
            stack.enter_context(open_actors(recipe, todo[0]))  # Ray starts once
        for spec in todo:
            try:
                _predict(recipe, spec)
            except _Failed as error:
                failed[spec.scene.path] = error
        where = write_failures(recipe.out, [one for problem in failed.values() for one in problem.failures])
        for spec in specs:
            if spec.scene.path not in failed:
                shutil.rmtree(spec.scratch, ignore_errors=True)
                _tell(recipe, spec)
    if failed:
        lines = [
            f"{len(failed)} of {len(specs)} scenes are not finished; run the same command again to go on (also in "
            f"{where}):"
        ]
        for problem in failed.values():
            lines += [problem.title, *(sentence for _, sentence in problem.failures)]
        raise FinishedWithFailures("\n  ".join(lines))


def _look(paths: list[Path]) -> list[raster.Scene]:
    """The headers of all scenes, before anything starts; what is wrong with any is told at once (UserError)."""
    scenes, problems = [], []
    for path in paths:
        try:
            scenes.append(raster.look(path))
        except UserError as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise FoundProblems(f"{len(problems)} of {len(paths)} scenes cannot be predicted:", problems)
    for scene in scenes:
        if not scene.crs_wkt:
            print(
                f"predict: {scene.path.name} names no coordinate system, so its outputs have none and its GSD is "
                "unknown",
                file=sys.stderr,
            )
    return scenes


def _wanted(recipe: PredictRecipe, spec: SceneSpec) -> list[Path]:
    """The outputs of a scene."""
    paths = outputs(recipe.out, key_of(spec.scene.path))
    return list(asdict(paths).values()) if recipe.rectify else [paths.agl, paths.vflow]


def _tell(recipe: PredictRecipe, spec: SceneSpec) -> None:
    paths = outputs(recipe.out, key_of(spec.scene.path))
    facts = json.loads(paths.vflow.read_bytes())
    print(
        f"{paths.agl}: {spec.scene.rows} x {spec.scene.columns} pixels; angle {math.degrees(facts['angle']):.1f} +- "
        f"{facts['angle_spread_deg']:.1f} degrees, scale {facts['scale']:.4g} +- {facts['scale_spread']:.2g} "
        f"px/{recipe.unit}, windows differ by {facts['seam_rms_m']:.2g} m (RMS) where they meet"
    )


def _tell_plan(recipe: PredictRecipe, specs: list[SceneSpec]) -> None:
    for spec in specs:
        finished = all(path.is_file() for path in _wanted(recipe, spec)) and not recipe.overwrite
        print(
            f"{spec.scene.path.name}: {spec.scene.rows} x {spec.scene.columns} pixels, "
            + ("finished" if finished else f"{spec.plan.windows} windows, {spec.plan.blocks} blocks to do")
        )


def _spec(
    recipe: PredictRecipe, checkpoints: tuple[Path, ...], scene: raster.Scene, reduction: int
) -> SceneSpec:
    net, key = recipe.net, key_of(scene.path)
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


def _begin(recipe: PredictRecipe, spec: SceneSpec, maker: dict[str, Any]) -> bool:
    """Forget what another scene of this name, or another maker, left behind; whether there is anything to do."""
    wanted, stat = _wanted(recipe, spec), spec.scene.path.stat()
    facts = {
        "rows": spec.scene.rows,
        "columns": spec.scene.columns,
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "batch": recipe.batch,
        "transform": list(spec.scene.transform),
        "made_by": maker,
    }
    told = spec.scratch.with_name("scene.json")
    before = json.loads(told.read_bytes()) if told.is_file() else None
    if recipe.overwrite or before != facts:
        shutil.rmtree(spec.scratch, ignore_errors=True)
        for path in wanted:
            path.unlink(missing_ok=True)
    write_if_new(told, (json.dumps(facts, indent=1) + "\n").encode())
    return not all(path.is_file() for path in wanted)


def _predict(recipe: PredictRecipe, spec: SceneSpec) -> None:
    """All windows, then all outputs (_Failed naming what is not there)."""
    paths = outputs(recipe.out, key_of(spec.scene.path))
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
        _predict_windows(spec, crew, todo)
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


def _predict_windows(spec: SceneSpec, crew: Crew, todo: list[WindowItem]) -> None:
    """All windows to the scratch folder (_Failed naming those that are not there)."""
    total = spec.plan.windows
    count = sum(len(item.windows) for item in todo)
    failures: list[tuple[str, str]] = []
    with metrics_log.Progress(total, f"windows, {crew.where}", "windows", start=total - count) as progress:
        for item, answer in crew.work.results(todo):
            failures += _failures_of(item, answer)
            progress.advance(len([window for window in item.windows if window is not None]))
    _stop_at(spec, failures, f"{len(failures)} of {total} windows failed; the others are kept")


def _failures_of(item: WindowItem | BlockItem, answer: Report | SetAside) -> list[tuple[str, str]]:
    if isinstance(answer, SetAside):
        return [(str(item), f"{item}: set aside, {answer.reason}")]
    return [(str(item), sentence) for sentence in answer.failures]


def _stop_at(spec: SceneSpec, failures: list[tuple[str, str]], title: str) -> None:
    if failures:
        raise _Failed(f"{spec.scene.path.name}: {title}", failures)


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
    _stop_at(spec, failures, f"{len(failures)} of {len(items)} blocks failed")
    for canvas in canvases.values():
        canvas.finish()
    seams.seam_squares = math.fsum(squares)  # blocks come in any order
    return seams
