"""Checked doors of what a synthetic sensor and lidar make of a picture, and their slow twins.

Noise and gaps are hashes of the pixel's number under a seed: the same on every machine and in any order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

import geopose_dist.kernels._sensor as _sensor
from geopose_dist.kernels.render import Picture

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]

SPREAD = 147.8005
"""Deviation of the sum of four random bytes."""
CHANCES = 1 << 32


def develop(
    image: F32, gain: tuple[float, ...], offset: tuple[float, ...], tone: F32, noise: float, seed: int
) -> U8:
    """8 bits of a linear image [H, W, 3]: tone[image * gain + offset], plus noise of a deviation in grey levels.

    `tone` is the curve at whole numbers from 0; values beyond its ends take those.
    """
    rows, cols, bands = image.shape
    if len(gain) != bands or len(offset) != bands:
        raise ValueError(f"gain and offset have {len(gain)} and {len(offset)} bands; the image has {bands}")
    out = np.empty((rows, cols, bands), np.uint8)
    _sensor.develop(
        np.ascontiguousarray(image, np.float32).reshape(rows, cols * bands),
        *(np.tile(np.array(values, np.float32), cols) for values in (gain, offset)),
        np.ascontiguousarray(tone, np.float32),
        noise / SPREAD,
        seed & 0xFFFFFFFF,
        out.reshape(rows, cols * bands),
    )
    return out


def develop_slow(
    image: F32, gain: tuple[float, ...], offset: tuple[float, ...], tone: F32, noise: float, seed: int
) -> U8:
    """Twin of `develop`."""
    stretched = image * np.array(gain, np.float32) + np.array(offset, np.float32)
    places = np.clip(stretched, 0, len(tone) - 1).astype(np.int32)
    code = mixed(np.arange(image.size, dtype=np.uint32) ^ mixed(np.uint32(seed & 0xFFFFFFFF)))
    total = code.view(np.uint8).reshape(*image.shape, 4).sum(axis=-1, dtype=np.int32) - 510
    toned = tone[places] + np.float32(noise / SPREAD) * total.astype(np.float32)
    out: U8 = (np.clip(toned, 0, 255) + np.float32(0.5)).astype(np.uint8)
    return out


def label(
    picture: Picture,
    holes: U8,
    cells_per_hole: float,
    gone: U8,
    wall_gaps: float = 0.0,
    speckle: float = 0.0,
    seed: int = 0,
) -> U16:
    """Heights as a label file holds them: uint16 cm, 65535 where the lidar has no data.

    `holes` is 1 where the map, at `cells_per_hole`, was not measured; `gone` [objects] is 1 for things that never are;
    `wall_gaps` and `speckle` are chances of a pixel of a wall and of any pixel.
    """
    for name, value in (("wall_gaps", wall_gaps), ("speckle", speckle)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; wanted a share of at least 0 and below 1")
    if picture.seen.max() >= len(gone):
        raise ValueError(f"gone has {len(gone)} rows, but object {picture.seen.max()} is seen")
    out = np.empty(picture.agl_m.shape, np.uint16)
    _sensor.label(
        *(picture.agl_m, picture.row, picture.col, picture.kind, picture.seen),
        *(np.ascontiguousarray(holes, np.uint8), cells_per_hole, np.ascontiguousarray(gone, np.uint8)),
        *(int(wall_gaps * CHANCES), int(speckle * CHANCES), seed & 0xFFFFFFFF, out),
    )
    return out


def label_slow(
    picture: Picture,
    holes: U8,
    cells_per_hole: float,
    gone: U8,
    wall_gaps: float = 0.0,
    speckle: float = 0.0,
    seed: int = 0,
) -> U16:
    """Twin of `label`."""
    per = np.float32(1) / np.float32(cells_per_hole)
    row = np.minimum((picture.row * per).astype(int), holes.shape[0] - 1)
    col = np.minimum((picture.col * per).astype(int), holes.shape[1] - 1)
    code = mixed(np.arange(row.size, dtype=np.uint32) ^ mixed(np.uint32(seed & 0xFFFFFFFF))).reshape(
        row.shape
    )
    hole = (holes[row, col] > 0) | (gone[picture.seen] > 0) | (mixed(code) < int(speckle * CHANCES))
    hole |= (picture.kind == 1) & (code < int(wall_gaps * CHANCES))
    out: U16 = (picture.agl_m * np.float32(100) + np.float32(0.5)).astype(np.uint16)
    out[hole] = 65535
    return out


def mixed(codes: U32 | np.uint32) -> U32:
    """The hash of the kernels (the finaliser of murmur3), by numpy."""
    a = np.atleast_1d(np.asarray(codes, np.uint32)).copy()
    a ^= a >> np.uint32(16)
    a *= np.uint32(0x85EBCA6B)
    a ^= a >> np.uint32(13)
    a *= np.uint32(0xC2B2AE35)
    a ^= a >> np.uint32(16)
    return a
