"""`geopose convert`: predictions in float metres and px/m become challenge files in uint16 cm and px/cm.

The tutorial's compress step, in parallel and checked: NaN, infinity or a scale in the wrong unit is refused
by name, heights outside 0 .. 655.34 m are clipped and counted. Outputs newer than their
inputs are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from geopose_dist import geometry, metrics_log
from geopose_dist.errors import FoundProblems, UserError
from geopose_dist.evaluate import predictions as files
from geopose_dist.files import write_bytes
from geopose_dist.pool import process_map


@dataclass(frozen=True)
class ConvertRecipe:
    """Turn a folder of float metres and px/m into challenge files."""

    predictions: Path
    """Folder of KEY_AGL.tif (float metres) and KEY_VFLOW.json (px/m, radians)."""
    out: Path
    """Folder for KEY_AGL.tif (uint16 centimetres) and KEY_VFLOW.json (px/cm, radians)."""
    from_unit: Literal["m"] = "m"
    """Unit of the predictions: m, metres and px/m. Also written --from."""
    workers: int = 0
    """Worker processes; 0 means one per core."""

    ALIASES: ClassVar[Mapping[str, str]] = {"from": "from_unit"}

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; wanted 0 (one per core) or more")


@dataclass(frozen=True)
class _Job:
    tile: files.TileFiles
    out: Path


def run(recipe: ConvertRecipe) -> None:
    """Convert every tile; what is wrong with any of them is listed at once, exit code 2."""
    if recipe.out.resolve() == recipe.predictions.resolve():
        raise UserError(f"--out {recipe.out} is the folder of the predictions; give another one")
    listing = files.list_folder(recipe.predictions, "--predictions")
    problems = [
        *listing.problems,
        *(f"{path}: not a prediction's file name; remove it" for path in listing.others),
    ]
    if not listing.tiles:
        raise UserError(f"--predictions {recipe.predictions}: no KEY_AGL.tif in it; is it the right folder?")
    for key, tile in listing.tiles.items():
        missing = [name for name, path in (("AGL.tif", tile.agl), ("VFLOW.json", tile.vflow)) if path is None]
        problems += [
            f"{recipe.predictions / f'{key}_{name}'}: missing; both files of a tile are needed"
            for name in missing
        ]
    jobs = [_Job(tile, recipe.out) for tile in listing.tiles.values() if tile.agl and tile.vflow]
    clipped = tiles_clipped = 0
    done = process_map(_convert_one, jobs, workers=recipe.workers)
    for wrong, pixels in metrics_log.track(done, total=len(jobs), label="convert"):
        problems += wrong
        clipped += pixels
        tiles_clipped += pixels > 0
    if problems:
        raise FoundProblems(f"{len(problems)} problems; the other tiles were converted:", problems)
    told = f", {clipped} pixels in {tiles_clipped} tiles clipped to 0 .. 655.34 m" if clipped else ""
    print(f"{recipe.out}: {len(jobs)} tiles converted{told}")


def _convert_one(job: _Job) -> tuple[list[str], int]:
    """Write one tile; what is wrong with it, and how many pixels had to be clipped."""
    assert job.tile.agl is not None
    assert job.tile.vflow is not None
    targets = (job.out / f"{job.tile.key}_AGL.tif", job.out / f"{job.tile.key}_VFLOW.json")
    newest = max(job.tile.agl.stat().st_mtime_ns, job.tile.vflow.stat().st_mtime_ns)
    if all(path.is_file() and path.stat().st_mtime_ns >= newest for path in targets):
        return [], 0
    problems = []
    try:
        heights = files.read_tiff(job.tile.agl)
        if heights.dtype.kind != "f" or heights.ndim != 2:
            problems.append(
                f"{job.tile.agl}: {heights.dtype} {heights.shape}; wanted float metres, rows x columns"
            )
        elif not np.isfinite(heights).all():
            wrong = int((~np.isfinite(heights)).sum())
            problems.append(
                f"{job.tile.agl}: {wrong} pixels are NaN or infinite; a prediction is finite everywhere"
            )
        scale, angle = files.read_vflow(job.tile.vflow)
        problems += geometry.check_label(scale, angle, "px/m", str(job.tile.vflow))
    except UserError as error:
        problems.append(str(error))
    if problems:
        return problems, 0
    centimetres, clipped = files.heights_cm(heights.astype(np.float32))
    write_bytes(targets[0], files.encode_agl(centimetres))
    write_bytes(targets[1], files.encode_vflow(scale, angle))
    return [], clipped
