"""One synthetic tile on disk: its names, its rendering, its bytes, and the note that says it is whole.

A tile's files are written one by one, each whole or not at all; the note in `.synth/tiles` comes last and holds
their sizes, so a run that was killed is known to be unfinished. The extras of a tile (`extras/`) are other truths of
the same view: which building each pixel shows, which one stands on the ground there, and that ground seen from
straight above. The heavy imports wait until a job runs.
"""

from __future__ import annotations

import errno
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from geopose_dist import files, geometry
from geopose_dist.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shards.synth_camera import Camera
    from shards.synth_faults import FaultRecipe

FORMAT_AGL_CM, FORMAT_SCALE, FORMAT_ANGLE = 400, 0.0097, 3.14159
"""The constant answer of submission_format: near the mean of the challenge's labels."""
BOOKS = ".synth"
EXTRAS = {
    "instances": {"INSTANCES": "tif"},
    "ground": {"FOOTPRINTS": "tif", "ORTHO_RGB": "png", "ORTHO_AGL": "tif", "ORTHO_SEEN": "png"},
}
"""Files of each kind of extras, by what follows the tile's name, with their formats."""
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]


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

    @property
    def place_name(self) -> str:
        """Name of its place in tables and shards."""
        return f"{self.city}{self.place:05d}"

    def targets(self, extras: tuple[str, ...] = ()) -> dict[str, str]:
        """Relative paths of its files by what they hold, those of some kinds of extras included."""
        truth = "test_truth" if self.test else "train"
        paths = {
            "rgb": f"{'test_rgbs' if self.test else 'train'}/{self.stem}_RGB.j2k",
            "agl": f"{truth}/{self.stem}_AGL.tif",
            "json": f"{truth}/{self.stem}_VFLOW.json",
        }
        for kind in extras:
            for name, extension in EXTRAS[kind].items():
                paths[name] = f"extras/{self.stem}_{name}.{extension}"
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
    relief: float
    faults: FaultRecipe
    extras: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rendered:
    """A tile in memory: pixels, heights in cm, pose in the units of files, and its extras by name."""

    tile: TileName
    rgb: U8
    cm: U16
    camera: Camera
    extras: dict[str, U8 | U16]

    @property
    def gsd_m(self) -> float:
        """Mean ground metres per pixel, as tables hold it."""
        return round(self.camera.gsd_m, 6)

    @property
    def pose(self) -> dict[str, float]:
        """Scale in px/cm and angle in radians."""
        return {"scale": geometry.px_per_cm(self.camera.scale_px_per_m), "angle": self.camera.angle_rad}


def render(job: Job) -> Iterator[Rendered]:
    """The views of a job, one after another."""
    from shards import synth_look, synth_scene
    from shards.synth_districts import keyed

    scene = synth_scene.build(
        *(job.city, job.size, job.seed, job.place),
        relief=job.relief,
        faults=job.faults,
        owners=bool(job.extras),
    )
    for tile in job.tiles:
        rng = keyed(job.seed, job.place, 5, tile.view)
        camera = view_camera(job.city, job.size, job.seed, job.place, tile.view)
        day = synth_look.draw_day(job.city, rng)
        looks = scene.looks(day)
        picture = scene.picture(camera, looks)
        stretch = synth_look.stretch_of(picture.radiance, day)
        rgb = synth_look.develop(picture.radiance, day, rng, stretch)
        cm = scene.label_cm(camera, picture, rng)
        extras: dict[str, U8 | U16] = {}
        if "instances" in job.extras:
            extras["INSTANCES"] = scene.instances(picture.row, picture.col)
        if "ground" in job.extras:
            ground = scene.truth(camera, looks)
            extras["FOOTPRINTS"] = ground.footprints
            extras["ORTHO_RGB"] = synth_look.develop(
                ground.radiance, replace(day, noise=0.0, blur_px=0.3), rng, stretch
            )
            extras["ORTHO_AGL"] = np.rint(ground.agl_m * 100).astype(np.uint16)
            extras["ORTHO_SEEN"] = ground.seen * np.uint8(255)
        yield Rendered(tile, rgb, cm, camera, extras)


def render_job(job: Job) -> list[tuple[str, float]]:
    """Render and write the views of a job; returns (id, gsd in metres) of each."""
    done = []
    for made in render(job):
        tile = made.tile
        contents = {
            "rgb": encode_j2k(made.rgb),
            "agl": encode_tif(made.cm),
            "json": json.dumps(made.pose).encode(),
            **{name: encode_extra(pixels) for name, pixels in made.extras.items()},
        }
        if tile.test:
            contents["format_agl"] = encode_tif(np.full_like(made.cm, FORMAT_AGL_CM))
            contents["format_json"] = json.dumps({"scale": FORMAT_SCALE, "angle": FORMAT_ANGLE}).encode()
        sizes = {}
        for what, path in tile.targets(job.extras).items():
            write(job.out / path, contents[what])
            sizes[path] = len(contents[what])
        write(_note(job.out, tile), json.dumps({"files": sizes, "gsd_m": made.gsd_m}).encode())
        done.append((tile.id, made.gsd_m))
    return done


def view_camera(city: str, size: int, seed: int, place: int, view: int) -> Camera:
    """The camera of a view."""
    from shards import synth_camera, synth_districts

    return synth_camera.draw_camera(city, size, synth_districts.keyed(seed, place, 6, view))


def encode_j2k(rgb: U8) -> bytes:
    """JPEG 2000 codestream at 44 dB, visually lossless, as a provider would deliver."""
    import imagecodecs

    return bytes(imagecodecs.jpeg2k_encode(rgb, level=44, codecformat="j2k", numthreads=1))


def encode_extra(pixels: U8 | U16) -> bytes:
    """TIFF of 16 bits, PNG of 8."""
    import imagecodecs

    return encode_tif(pixels) if pixels.dtype == np.uint16 else bytes(imagecodecs.png_encode(pixels, level=3))


def encode_tif(cm: npt.NDArray[np.generic]) -> bytes:
    """Lossless deflate TIFF of heights in centimetres, or of other numbers of 16 bits."""
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
