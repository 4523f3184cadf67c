"""One synthetic tile on disk: its names, its rendering, its bytes, and the note that says it is whole.

A tile's files are written one by one, each whole or not at all; the note in `.synth/tiles` comes last and holds
their sizes, so a run that was killed is known to be unfinished. The heavy imports wait until a job runs.
"""

from __future__ import annotations

import errno
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from geopose_dist import files, geometry
from geopose_dist.errors import UserError

if TYPE_CHECKING:
    from shards.synth_camera import Camera

FORMAT_AGL_CM, FORMAT_SCALE, FORMAT_ANGLE = 400, 0.0097, 3.14159
"""The constant answer of submission_format: near the mean of the challenge's labels."""
BOOKS = ".synth"


@dataclass(frozen=True)
class TileName:
    """What a tile is called and which part of the dataset it belongs to."""

    city: str
    place: int
    view: int
    id: str
    test: bool

    @property
    def stem(self) -> str:
        """Start of its file names."""
        return f"{self.city}_{self.id}"

    def targets(self) -> dict[str, str]:
        """Relative paths of its files by what they hold."""
        truth = "test_truth" if self.test else "train"
        paths = {
            "rgb": f"{'test_rgbs' if self.test else 'train'}/{self.stem}_RGB.j2k",
            "agl": f"{truth}/{self.stem}_AGL.tif",
            "json": f"{truth}/{self.stem}_VFLOW.json",
        }
        if self.test:
            paths["format_agl"] = f"submission_format/{self.stem}_AGL.tif"
            paths["format_json"] = f"submission_format/{self.stem}_VFLOW.json"
        return paths


@dataclass(frozen=True)
class Job:
    """Views of one place that one worker renders."""

    out: Path
    size: int
    seed: int
    city: str
    place: int
    tiles: tuple[TileName, ...]


def render_job(job: Job) -> list[tuple[str, float]]:
    """Render and write the views of a job; returns (id, gsd in metres) of each."""
    from shards import synth_districts, synth_look

    keyed = synth_districts.keyed
    plan = synth_districts.build(job.city, job.size, job.seed, job.place)
    terrain, around = plan.terrain(), plan.around()
    holes = synth_look.draw_holes(job.city, plan, job.size, keyed(job.seed, job.place, 4))
    done = []
    for tile in job.tiles:
        rng = keyed(job.seed, job.place, 5, tile.view)
        camera = view_camera(job.city, job.size, job.seed, job.place, tile.view)
        day = synth_look.draw_day(job.city, rng)
        picture = synth_look.take_picture(plan, terrain, around, camera, day, job.size)
        rgb = synth_look.develop(picture.radiance, day, rng)
        cm = synth_look.label_cm(picture, plan, holes, job.city, rng)
        pose = {"scale": geometry.px_per_cm(camera.scale_px_per_m), "angle": camera.angle_rad}
        contents = {"rgb": encode_j2k(rgb), "agl": encode_tif(cm), "json": json.dumps(pose).encode()}
        if tile.test:
            contents["format_agl"] = encode_tif(np.full_like(cm, FORMAT_AGL_CM))
            contents["format_json"] = json.dumps({"scale": FORMAT_SCALE, "angle": FORMAT_ANGLE}).encode()
        sizes = {}
        for what, path in tile.targets().items():
            write(job.out / path, contents[what])
            sizes[path] = len(contents[what])
        write(_note(job.out, tile), json.dumps({"files": sizes, "gsd_m": round(camera.gsd_m, 6)}).encode())
        done.append((tile.id, round(camera.gsd_m, 6)))
    return done


def view_camera(city: str, size: int, seed: int, place: int, view: int) -> Camera:
    """The camera of a view."""
    from shards import synth_camera, synth_districts

    return synth_camera.draw_camera(city, size, synth_districts.keyed(seed, place, 6, view))


def encode_j2k(rgb: npt.NDArray[np.uint8]) -> bytes:
    """JPEG 2000 codestream at 44 dB, visually lossless, as a provider would deliver."""
    import imagecodecs

    return bytes(imagecodecs.jpeg2k_encode(rgb, level=44, codecformat="j2k", numthreads=1))


def encode_tif(cm: npt.NDArray[np.uint16]) -> bytes:
    """Lossless deflate TIFF of heights in centimetres."""
    import tifffile

    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        cm,
        compression="zlib",
        compressionargs={"level": 4},
        predictor=True,
        metadata=None,
        rowsperstrip=256,
    )
    return buffer.getvalue()


def _note(out: Path, tile: TileName) -> Path:
    return out / BOOKS / "tiles" / f"{tile.stem}.json"


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; a full disk is a UserError that says how to go on."""
    try:
        files.write_bytes(path, data)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{path}: the disk is full; free some space and run the same command again, it goes on where it stopped"
        ) from error


def finished(out: Path, tile: TileName) -> float | None:
    """GSD of a tile whose files are all there with the sizes that were noted, else None."""
    try:
        note = json.loads(_note(out, tile).read_bytes())
        whole = all((out / path).stat().st_size == size for path, size in note["files"].items())
        return float(note["gsd_m"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
