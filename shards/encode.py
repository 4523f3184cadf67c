"""One tile of a dataset to the members of one sample: decode, check, reduce, encode.

Runs in worker processes; a tile that cannot be packed comes back as its reason, so that all of them can be
named. Facts are those of the stored pixels: scale / reduce in px/m, gsd * reduce.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geopose_dist import geometry
from geopose_dist.data import codecs, resample
from geopose_dist.data.sample import TileFacts
from geopose_dist.data.tile import tallest_m, unknown_px
from geopose_dist.errors import UserError
from geopose_dist.geometry import F32
from shards import layouts, wavelet
from shards.layouts import Tile
from shards.tallies import Tally, of_tile

U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Job:
    """A tile and how to store it (see `PackRecipe`)."""

    tile: Tile
    reduce: int
    rgb_codec: str
    agl_codec: str
    crop: bool
    reduce_by: str = "area"


@dataclass(frozen=True)
class Sample:
    """Members by extension, ready for the tar, and what they count for."""

    key: str
    city: str
    members: dict[str, bytes]
    tally: Tally


@dataclass(frozen=True)
class Damaged:
    """A tile that cannot be packed, and why, in one sentence that names its file."""

    key: str
    sentence: str


def encode(job: Job) -> Sample | Damaged:
    """The sample of a tile, or why there is none."""
    try:
        return _encode(job)
    except UserError as error:
        return Damaged(job.tile.key, str(error))


def _reduced_rgb(job: Job) -> tuple[U8, tuple[int, int]]:
    """The stored pixels of a tile's image, and the (H, W) that the image has."""
    tile, factor = job.tile, job.reduce
    if job.reduce_by == "wavelet":
        rgb, (rows, columns) = wavelet.read_rgb(tile.rgb, factor)
    else:
        rgb = layouts.load_rgb(tile)
        rows, columns = rgb.shape[:2]
    if not job.crop:
        try:
            resample.check_divisible(rows, columns, factor)
        except ValueError as error:
            raise UserError(f"{tile.rgb}: {error}; pack with --odd-sizes crop, or with --reduce 1") from error
    if min(rows, columns) < factor:
        raise UserError(f"{tile.rgb}: {(rows, columns)} pixels are too few to reduce by {factor}; remove it")
    if job.reduce_by == "wavelet":
        return np.ascontiguousarray(rgb[: rows // factor, : columns // factor]), (rows, columns)
    whole = np.ascontiguousarray(rgb[: rows // factor * factor, : columns // factor * factor])
    return resample.reduce_rgb(whole, factor), (rows, columns)


def _encode(job: Job) -> Sample:
    tile, factor = job.tile, job.reduce
    rgb, (rows, columns) = _reduced_rgb(job)
    agl_m, pose = layouts.load_agl_m(tile), layouts.load_pose(tile)
    if agl_m is not None and agl_m.shape != (rows, columns):
        raise UserError(
            f"{tile.agl}: {agl_m.shape[0]} x {agl_m.shape[1]} pixels, but its image {tile.rgb.name} has "
            f"{rows} x {columns}; mend or remove one of them"
        )
    if agl_m is not None and job.crop:
        agl_m = np.ascontiguousarray(agl_m[: rows // factor * factor, : columns // factor * factor])
    return _stored(job, rgb, agl_m, pose)


def sample_of(job: Job, rgb: U8, agl_m: F32 | None, pose: tuple[float, float] | None) -> Sample:
    """The sample of a tile that is in memory, uint8 [H, W, 3] and its labels at full size, instead of in files."""
    return _stored(job, resample.reduce_rgb(rgb, job.reduce), agl_m, pose)


def _stored(job: Job, rgb: U8, agl_m: F32 | None, pose: tuple[float, float] | None) -> Sample:
    """The sample of reduced pixels and labels at full size."""
    tile, factor = job.tile, job.reduce
    rgb_member = f"rgb.{codecs.by_name(codecs.RGB_CODECS, job.rgb_codec).extension}"
    members = {rgb_member: codecs.encode_rgb(job.rgb_codec, rgb)}
    agl_cm, tallest, unknown = None, None, None
    if agl_m is not None:
        agl_cm, _ = geometry.agl_cm_from_m(resample.reduce_agl(agl_m, factor), unknown_allowed=True)
        extension = codecs.by_name(codecs.AGL_CODECS, job.agl_codec).extension
        members[f"agl.{extension}"] = codecs.encode_agl(job.agl_codec, agl_cm)
        tallest, unknown = tallest_m(agl_cm), unknown_px(agl_cm)
    scale = None if pose is None else pose[0] / factor
    facts = TileFacts(
        city=tile.city,
        place=tile.place,
        gsd_m=None if tile.gsd_m is None else tile.gsd_m * factor,
        scale_px_per_m=scale,
        angle_rad=None if pose is None else pose[1],
        size=(rgb.shape[0], rgb.shape[1]),
        tallest_m=tallest,
        unknown_px=unknown,
    )
    members["json"] = facts.to_json()
    return Sample(tile.key, tile.city, members, of_tile(agl_cm, scale))
