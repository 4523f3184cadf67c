"""Cutting and turning tiles for the network, and putting its answers back: pure functions on arrays.

Large tiles are covered by overlapping windows whose weights fade in and out and sum to one, so there is no
seam. A `Symmetry` mirrors or transposes a tile, and maps heights and direction vectors back: the direction
(x, y) points from roof to ground in the image, so mirroring left-right negates x, and transposing swaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from geopose_dist.geometry import F32

Pixels = npt.NDArray[Any]


@dataclass(frozen=True)
class Symmetry:
    """One of the eight symmetries of a square: mirror rows, then columns, then swap the two.

    Attributes:
        flip_rows: top to bottom.
        flip_columns: left to right.
        transpose: rows become columns, after the flips.
    """

    flip_rows: bool = False
    flip_columns: bool = False
    transpose: bool = False

    def apply(self, pixels: Pixels) -> Pixels:
        """A view of [..., H, W] pixels under this symmetry."""
        turned: Pixels = pixels[..., :: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]
        return np.swapaxes(turned, -1, -2) if self.transpose else turned

    def undo(self, pixels: Pixels) -> Pixels:
        """The inverse of `apply`, for maps [..., H, W]."""
        straight = np.swapaxes(pixels, -1, -2) if self.transpose else pixels
        return straight[..., :: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]

    def undo_direction(self, xy: Pixels) -> Pixels:
        """Direction vectors (x, y) [..., 2] of a turned tile, in the tile as it was."""
        straight: Pixels = xy[..., ::-1] if self.transpose else xy
        unmirrored: Pixels = straight * np.array(
            [-1 if self.flip_columns else 1, -1 if self.flip_rows else 1], xy.dtype
        )
        return unmirrored


def symmetries(tta: str) -> list[Symmetry]:
    """The symmetries that `net.tta` names; the first one changes nothing."""
    flips = [Symmetry(rows, columns) for rows in (False, True) for columns in (False, True)]
    turned = [Symmetry(flip.flip_rows, flip.flip_columns, True) for flip in flips]
    return {"none": flips[:1], "flips": flips, "dihedral": flips + turned}[tta]


def window_starts(side: int, window: int, overlap: int, step: int = 1) -> list[int]:
    """First pixels of windows that cover 0 .. side, evenly spread, sharing at least `overlap` pixels.

    They are multiples of `step`: a network that halves its maps five times answers alike only under shifts by 32.
    `side` and `window` are multiples of it too (ValueError).
    """
    if side <= window:
        return [0]
    if side % step or window % step:
        raise ValueError(f"side {side} and window {window} are to be multiples of {step}")
    steps, wide, shared = side // step, window // step, -(-overlap // step)
    if shared >= wide:
        raise ValueError(f"windows of {window} cannot share {overlap} pixels in steps of {step}")
    count = -(-(steps - shared) // (wide - shared))
    return [i * (steps - wide) // (count - 1) * step for i in range(count)]


def window_weights(starts: list[int], side: int, window: int) -> F32:
    """Weights float32 [windows, side] along one axis: 0 outside each window, and the sum over windows is 1.

    Two neighbours change over linearly in the middle half of what they share, so pixels near a window's
    border, where the network sees less around them, are not used. Borders of the tile have no neighbour.
    """
    weights = np.zeros((len(starts), side), np.float32)
    at = np.arange(side) + 0.5
    for i, start in enumerate(starts):
        weights[i] = 1
        if i > 0:
            shared = max(starts[i - 1] + window - start, 1e-3)
            weights[i] = np.clip((at - start - shared / 4) / (shared / 2), 0, 1)
            weights[i - 1] = np.minimum(weights[i - 1], 1 - weights[i])
        weights[i, min(start + window, side) :] = 0
    weights /= weights.sum(axis=0)  # where the even spread lets three windows meet
    return weights


@dataclass(frozen=True)
class Window:
    """One window: where it lies, and the weight [rows, columns] of its answer at each of its pixels."""

    rows: slice
    columns: slice
    weight: F32


def windows(size: tuple[int, int], window: int, overlap: int, step: int = 1) -> Iterator[Window]:
    """Windows that cover a tile of `size` (rows, columns), see `window_starts`; one without overlap if it fits."""
    row_starts, column_starts = (window_starts(side, window, overlap, step) for side in size)
    row_weights = window_weights(row_starts, size[0], window)
    column_weights = window_weights(column_starts, size[1], window)
    for i, row in enumerate(row_starts):
        for j, column in enumerate(column_starts):
            rows = slice(row, min(row + window, size[0]))
            columns = slice(column, min(column + window, size[1]))
            yield Window(rows, columns, np.outer(row_weights[i, rows], column_weights[j, columns]))


def pad_to_multiple(pixels: Pixels, multiple: int) -> Pixels:
    """[..., H, W] pixels continued by reflection below and to the right up to multiples of `multiple`.

    A side shorter than what is missing is reflected again and again (numpy's rule).
    """
    down, right = (-side % multiple for side in pixels.shape[-2:])
    if not (down or right):
        return pixels
    before = [(0, 0)] * (pixels.ndim - 2)
    mode = "reflect" if min(pixels.shape[-2:]) > 1 else "edge"
    return np.pad(pixels, [*before, (0, down), (0, right)], mode=mode)  # type: ignore[call-overload,no-any-return]
