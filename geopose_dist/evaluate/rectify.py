"""`geopose rectify`: every pixel moved to its place on the ground, the rest marked as occluded.

For each prediction three files are written: KEY_RGB.png, KEY_AGL.tif (uint16 cm, 65535 where nothing is
known) and KEY_OCCLUDED.png (255 = hidden from the camera). The work is one kernel call per tile, spread over
processes; a tile whose outputs are newer than its inputs is left alone, so the command may be run again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from geopose_dist import geometry, kernels, metrics_log
from geopose_dist.data.sample import U8
from geopose_dist.errors import FinishedWithFailures, FoundProblems, UserError
from geopose_dist.evaluate import predictions as files
from geopose_dist.files import write_bytes
from geopose_dist.geometry import F32
from geopose_dist.pool import process_map
from shards import layouts


@dataclass(frozen=True)
class RectifyRecipe:
    """Move images and predicted heights to their ground position."""

    source: Path
    """Dataset with the images: a folder in any layout that `geopose pack` reads."""
    predictions: Path
    """Folder of KEY_AGL.tif and KEY_VFLOW.json; labels in the same form serve too."""
    out: Path
    """Folder for KEY_RGB.png, KEY_AGL.tif and KEY_OCCLUDED.png of each prediction."""
    workers: int = 0
    """Worker processes; 0 means one per core."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; wanted 0 (one per core) or more")


@dataclass(frozen=True)
class _Job:
    heights: files.TileFiles
    image: layouts.Tile | None
    out: Path


def outputs(folder: Path, key: str, *, image: bool) -> list[Path]:
    """The files written for a tile."""
    names = [f"{key}_AGL.tif", f"{key}_OCCLUDED.png", *([f"{key}_RGB.png"] if image else [])]
    return [folder / name for name in names]


def run(recipe: RectifyRecipe) -> None:
    """Rectify every prediction that has an image; predictions without one are refused by name."""
    images = {tile.key: tile for tile in layouts.read_layout(recipe.source)}
    _rectify_all(recipe.predictions, images, recipe.out, recipe.workers, image_needed=True)


def rectify_folder(truth: Path, predictions: Path, out: Path, *, workers: int = 0) -> None:
    """Rectify predictions and truth into `out/prediction` and `out/truth`, with images if truth has any."""
    has_images = any(truth.glob("*_RGB.*"))
    images = {tile.key: tile for tile in layouts.scan(truth).tiles} if has_images else {}
    for folder, name in ((predictions, "prediction"), (truth, "truth")):
        _rectify_all(folder, images, out / name, workers, image_needed=False)


def _rectify_all(
    folder: Path, images: dict[str, layouts.Tile], out: Path, workers: int, *, image_needed: bool
) -> None:
    listing = files.list_folder(folder, "--predictions")
    problems = list(listing.problems)
    jobs = []
    for key, tile in listing.tiles.items():
        missing = [name for name, path in (("AGL.tif", tile.agl), ("VFLOW.json", tile.vflow)) if path is None]
        problems += [
            f"{folder / f'{key}_{name}'}: missing; both files of a tile are needed" for name in missing
        ]
        if image_needed and key not in images:
            problems.append(
                f"{folder}: {key} has no image in the source; give the dataset that was predicted"
            )
        jobs.append(_Job(tile, images.get(key), out))
    if problems:
        raise FoundProblems(f"{len(problems)} problems keep {folder} from being rectified:", problems)
    if not jobs:
        raise UserError(f"--predictions {folder}: no KEY_AGL.tif in it; is it the right folder?")
    out.mkdir(parents=True, exist_ok=True)
    failures = []
    for failure in metrics_log.track(
        process_map(_rectify_one, jobs, workers=workers), total=len(jobs), label="rectify"
    ):
        failures += failure
    if failures:
        raise FinishedWithFailures("\n  ".join([f"{len(failures)} of {len(jobs)} tiles failed:", *failures]))


def _rectify_one(job: _Job) -> list[str]:
    """Write one tile's outputs; what is wrong with its files, if anything, one sentence each."""
    assert job.heights.agl is not None
    assert job.heights.vflow is not None
    inputs = [job.heights.agl, job.heights.vflow, *([job.image.rgb] if job.image else [])]
    targets = outputs(job.out, job.heights.key, image=job.image is not None)
    newest = max(path.stat().st_mtime_ns for path in inputs)
    if all(path.is_file() and path.stat().st_mtime_ns >= newest for path in targets):
        return []
    try:
        agl_m, scale_px_per_m, angle_rad = read_pose(job.heights.agl, job.heights.vflow)
        rgb = layouts.load_rgb(job.image) if job.image else np.zeros((*agl_m.shape, 3), np.uint8)
    except UserError as error:
        return [str(error)]
    if rgb.shape[:2] != agl_m.shape:
        return [f"{job.heights.agl}: size {agl_m.shape}; its image has {rgb.shape[:2]}; predict again"]
    flat_rgb, flat_agl_m, occluded = kernels.rectify(rgb, agl_m, scale_px_per_m, angle_rad)
    flat_cm, _ = geometry.agl_cm_from_m(
        np.where(occluded, np.float32(np.nan), flat_agl_m), unknown_allowed=True
    )
    pictures = [
        files.encode_agl(flat_cm),
        encode_png(occluded.astype(np.uint8) * np.uint8(255)),
        encode_png(flat_rgb),
    ]
    for target, data in zip(targets, pictures, strict=False):
        write_bytes(target, data)
    return []


def read_pose(agl: Path, vflow: Path) -> tuple[F32, float, float]:
    """Heights [H, W] in metres (NaN unknown), scale in px/m and angle in radians of two challenge files.

    uint16 is centimetres with px/cm, float is metres with px/m (UserError if neither, or damaged).
    """
    heights = files.read_tiff(agl)
    scale, angle = files.read_vflow(vflow)
    if heights.ndim != 2 or (heights.dtype != np.uint16 and heights.dtype.kind != "f"):
        raise UserError(
            f"{agl}: {heights.dtype} {heights.shape}; wanted rows x columns of uint16 cm or float metres"
        )
    centimetres = heights.dtype == np.uint16
    problems = geometry.check_label(scale, angle, "px/cm" if centimetres else "px/m", str(vflow))
    if problems:
        raise UserError("; ".join(problems))
    if centimetres:
        return geometry.agl_m_from_cm(heights), geometry.px_per_m(scale), geometry.wrap_angle(angle)
    return heights.astype(np.float32), scale, geometry.wrap_angle(angle)


def encode_png(pixels: U8) -> bytes:
    """A PNG of uint8 [H, W] or RGB [H, W, 3]."""
    picture: npt.NDArray[np.uint8] = pixels if pixels.ndim == 2 else np.ascontiguousarray(pixels[:, :, ::-1])
    done, data = cv2.imencode(".png", picture)
    assert done
    return data.tobytes()
