"""Doors of the `gpz` kernels: blocks of stored differences to pixels, and centimetres to metres and back.

What a block holds is told in `_planes.pyx`; `data/planes.py` reads and writes the members that hold blocks.
`out` may be a window of a larger image: its rows need not touch, the pixels of a row must. Slow NumPy twins
stand in `reference.py`. Wrong arguments are ValueErrors: name, found, wanted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

import geopose_dist.kernels._planes as _planes
from geopose_dist.geometry import F32

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
Mask = npt.NDArray[np.bool_]


def undo_rgb(planes: U8, size: tuple[int, int], at: tuple[int, int], out: U8) -> None:
    """Pixels of a block of colours.

    Args:
        planes: uint8 [3 * rows * columns]: differences of green, red - green, blue - green. Used up.
        size: rows and columns of the block.
        at: row and column of the block that out[0, 0] is.
        out: uint8 [h, w, 3], written; inside the block.
    """
    _check(planes, "planes", np.uint8, (3 * size[0] * size[1],))
    _check_window(out, np.uint8, size, at, 3)
    _planes.undo_rgb(planes, *size, *at, out)


def undo_heights(planes: U8, size: tuple[int, int], at: tuple[int, int], out: U16) -> None:
    """Heights of a block: low bytes, then high bytes, of zigzag differences; arguments as `undo_rgb`."""
    _check(planes, "planes", np.uint8, (2 * size[0] * size[1],))
    _check_window(out, np.uint16, size, at, 1)
    _planes.undo_heights(planes, *size, *at, np.empty(size[1], np.uint16), out)


def metres(agl_cm: U16) -> F32:
    """Heights uint16 [H, W] in centimetres as float32 metres; NaN where they are 65535."""
    _check(agl_cm, "agl_cm", np.uint16, agl_cm.shape)
    out = np.empty(agl_cm.shape, np.float32)
    if out.size:
        _planes.metres(agl_cm.reshape(-1), out.reshape(-1))
    return out


def centimetres(agl_m: F32, out: U16, inside: Mask | None = None, outside_cm: int = 65535) -> None:
    """Write metres as centimetres, rounded and clipped to 65533; NaN is 65535.

    Args:
        agl_m: float32 [H, W].
        out: uint16 [H, W], written; its rows need not touch.
        inside: bool [H, W]; where it is False, `outside_cm` is written; None = all inside.
    """
    _check(agl_m, "agl_m", np.float32, out.shape)
    _check_window(out, np.uint16, out.shape, (0, 0), 1)
    _planes.centimetres(agl_m, out)
    if inside is not None:
        mark_outside(inside, outside_cm, out)


def mark_outside(inside: Mask, outside_cm: int, out: U16) -> None:
    """Write `outside_cm` to `out` uint16 [H, W] where `inside` bool [H, W] is False."""
    _check(inside, "inside", np.bool_, out.shape)
    _check_window(out, np.uint16, out.shape, (0, 0), 1)
    _planes.outside(inside.view(np.uint8), outside_cm, out)


def _check(array: npt.NDArray[Any], name: str, dtype: type, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(
            f"{name} is {array.dtype} {list(array.shape)}; wanted contiguous {np.dtype(dtype)} {list(shape)}"
        )


def _check_window(
    out: npt.NDArray[Any], dtype: type, size: tuple[int, int], at: tuple[int, int], bands: int
) -> None:
    wanted = (bands, 1) if bands > 1 else (1,)
    strides = tuple(stride // out.itemsize for stride in out.strides[1:])
    if out.dtype != dtype or strides != wanted or out.shape[2:] != ((bands,) if bands > 1 else ()):
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)}, strides {list(out.strides)}; wanted {np.dtype(dtype)} "
            f"whose pixels of a row touch"
        )
    ends = (at[0] + out.shape[0], at[1] + out.shape[1])
    if min(at) < 0 or min(out.shape) < 1 or ends[0] > size[0] or ends[1] > size[1]:
        raise ValueError(f"out is {list(out.shape[:2])} at {at}; wanted a window of the block's {size}")
