"""Slow NumPy twins of the doors in `planes.py`, in the plainest form that is still exact."""

from __future__ import annotations

import numpy as np

from geopose_dist.geometry import F32
from geopose_dist.kernels.planes import U8, U16, Mask


def undo_rgb(planes: U8, size: tuple[int, int], at: tuple[int, int], out: U8) -> None:
    """Twin of `planes.undo_rgb`, which leaves `planes` alone: sums down the columns, modulo 256."""
    green, red, blue = planes.reshape(3, *size).copy()
    for plane in (green, red, blue):
        np.cumsum(plane[0], dtype=np.uint8, out=plane[0])
        np.cumsum(plane, axis=0, dtype=np.uint8, out=plane)
    pixels = np.stack([red + green, green, blue + green], axis=-1)
    out[...] = pixels[at[0] : at[0] + out.shape[0], at[1] : at[1] + out.shape[1]]


def undo_heights(planes: U8, size: tuple[int, int], at: tuple[int, int], out: U16) -> None:
    """Twin of `planes.undo_heights`: zigzag numbers to differences, sums modulo 65536."""
    low, high = planes.reshape(2, *size).astype(np.int64)
    zigzag = low + 256 * high
    differences = np.where(zigzag % 2 == 1, -(zigzag + 1) // 2, zigzag // 2)
    differences[0] = np.cumsum(differences[0])
    heights = (np.cumsum(differences, axis=0) % 65536).astype(np.uint16)
    out[...] = heights[at[0] : at[0] + out.shape[0], at[1] : at[1] + out.shape[1]]


def metres(agl_cm: U16) -> F32:
    """Twin of `planes.metres`."""
    agl_m: F32 = np.divide(agl_cm, np.float32(100), dtype=np.float32)
    agl_m[agl_cm == 65535] = np.nan
    return agl_m


def centimetres(agl_m: F32, out: U16, inside: Mask | None = None, outside_cm: int = 65535) -> None:
    """Twin of `planes.centimetres`."""
    rounded = np.clip(np.rint(agl_m * np.float32(100)), 0, 65533)
    out[...] = np.where(np.isnan(rounded), 65535, rounded)
    if inside is not None:
        out[~inside] = outside_cm
