"""Reducing tiles by a whole factor, and enlarging heights again.

RGB is reduced by area. A height of the reduced tile belongs to the centre of the area that the RGB pixel
averages, so it is the mean of the block's heights where the block shows one surface, and never
`[::factor, ::factor]`, which sits half a pixel off. Two things are never averaged: unknown heights, and
heights on both sides of an edge. Blocks with either are rare and are handled apart; the rest is one `cv2`
call. Enlarging fits a slope to each reduced pixel, limited so that it never reaches across an edge; on
slopes the two undo each other exactly.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from geopose_dist.geometry import F32

U8 = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

EDGE_M = 0.5
"""Neighbouring pixels further apart are on two surfaces, unless the same slope goes on beyond them."""
SLOPE_TOLERANCE = 0.1
"""A slope goes on if the next step differs by less than this share of it ..."""
SLOPE_TOLERANCE_M = 0.05
"""... plus this: files round to centimetres, and two of them may add up."""


def check_divisible(rows: int, columns: int, factor: int) -> None:
    """ValueError unless both sides are multiples of `factor`."""
    if factor < 1:
        raise ValueError(f"the factor of reduction is {factor}; wanted at least 1")
    if rows % factor or columns % factor:
        raise ValueError(
            f"{rows} x {columns} pixels (rows x columns) cannot be reduced by {factor}: wanted multiples of "
            f"{factor}, such as {max(rows // factor, 1) * factor} x {max(columns // factor, 1) * factor}"
        )


def pad_rgb(rgb: U8, factor: int) -> U8:
    """The image [H, W, 3] with its last row and column repeated up to multiples of `factor` (prediction)."""
    rows, columns = rgb.shape[:2]
    down, right = -rows % factor, -columns % factor
    return np.pad(rgb, ((0, down), (0, right), (0, 0)), mode="edge") if down or right else rgb


def reduce_rgb(rgb: U8, factor: int) -> U8:
    """uint8 [H, W, 3] -> uint8 [H/factor, W/factor, 3], each pixel the rounded mean of its block.

    ValueError if a side is no multiple of `factor`.
    """
    rows, columns = rgb.shape[:2]
    check_divisible(rows, columns, factor)
    if factor == 1:
        return rgb
    small = cv2.resize(rgb, (columns // factor, rows // factor), interpolation=cv2.INTER_AREA)
    return np.asarray(small, dtype=np.uint8)


def reduce_agl(agl_m: F32, factor: int) -> F32:
    """float32 metres [H, W] -> [H/factor, W/factor], registered to the centres of the area-reduced pixels.

    - Unknown if at least half of the block is unknown; unknown pixels are otherwise left out.
    - If the block shows an edge (see `EDGE_M`), only its larger surface counts, the taller one if two are
      equally large: every output lies within the heights of one surface.
    - What counts is averaged over pairs opposite about the block's centre, so a plane comes out exact at the
      centre even when pixels are left out.

    ValueError if a side is no multiple of `factor`.
    """
    rows, columns = agl_m.shape
    check_divisible(rows, columns, factor)
    if factor == 1:
        return agl_m
    shape = rows // factor, columns // factor
    small = np.asarray(cv2.resize(agl_m, shape[::-1], interpolation=cv2.INTER_AREA), dtype=np.float32)
    edged = _blocks_with_edges(agl_m, factor)
    special = np.flatnonzero(edged | np.isnan(small).ravel())
    if special.size:
        small.ravel()[special] = _reduce_blocks(_blocks(agl_m, factor, special), edged[special])
    return small


def _blocks(agl_m: F32, factor: int, which: npt.NDArray[np.intp]) -> F32:
    """Pixels [len(which), factor * factor] of the blocks at these flat positions, row by row."""
    columns = agl_m.shape[1]
    first = (which // (columns // factor)) * factor * columns + (which % (columns // factor)) * factor
    inner = (np.arange(factor)[:, None] * columns + np.arange(factor)).ravel()
    pixels: F32 = np.take(agl_m.ravel(), first[:, None] + inner)
    return pixels


def _blocks_with_edges(agl_m: F32, factor: int) -> Bools:
    """Whether each block (flat) has two neighbouring pixels on two surfaces."""
    rows, columns = agl_m.shape
    found = np.zeros((rows // factor) * (columns // factor), dtype=np.bool_)
    for p in range(factor - 1):
        _mark_jumps(found, agl_m, p, factor)
        _mark_jumps(found.reshape(rows // factor, -1).T, agl_m.T, p, factor)
    return found


def _mark_jumps(found: npt.NDArray[np.bool_], agl_m: F32, p: int, factor: int) -> None:
    """Mark the blocks in which the step down from row `p` of the block to the next row is an edge."""
    upper, lower = agl_m[p::factor], agl_m[p + 1 :: factor]
    i, column = np.nonzero(np.greater(np.abs(lower - upper), EDGE_M))
    if not i.size:
        return
    row = i * factor + p
    step = lower[i, column] - upper[i, column]
    last = len(agl_m) - 1
    before = np.where(row > 0, agl_m[row, column] - agl_m[np.maximum(row - 1, 0), column], np.nan)
    beyond = np.minimum(row + 2, last)
    after = np.where(row + 2 <= last, agl_m[beyond, column] - agl_m[row + 1, column], np.nan)
    tolerance = SLOPE_TOLERANCE * np.abs(step) + SLOPE_TOLERANCE_M
    # A facade is as steep as an edge but goes on for a pixel or more on one side; NaN compares as no.
    goes_on = (np.abs(before - step) <= tolerance) | (np.abs(after - step) <= tolerance)
    i, column = i[~goes_on], column[~goes_on]
    blocks = found if found.ndim == 2 else found.reshape(-1, agl_m.shape[1] // factor)
    blocks[i, column // factor] = True


def _reduce_blocks(blocks: F32, edged: Bools) -> F32:
    """One height per block of pixels [N, k] by the rules of `reduce_agl`; `edged` [N]: keep one surface."""
    k = blocks.shape[1]
    known = ~np.isnan(blocks)
    result = np.full(len(blocks), np.nan, dtype=np.float32)
    enough = np.flatnonzero(2 * known.sum(axis=1) > k)
    blocks, chosen = blocks[enough], known[enough]
    split = np.flatnonzero(edged[enough] | _hidden_edges(blocks, chosen))
    if split.size:
        chosen[split] &= _larger_surface(blocks[split])
    # Symmetric pairs: pixel j and pixel k-1-j are opposite about the centre.
    paired: Bools = chosen & chosen[:, ::-1]
    counted = np.where(np.any(paired, axis=1, keepdims=True), paired, chosen)
    total = np.where(counted, blocks, 0).sum(axis=1, dtype=np.float64)
    result[enough] = total / counted.sum(axis=1)
    return result


def _hidden_edges(blocks: F32, known: Bools) -> Bools:
    """Whether unknown pixels keep two surfaces of a block [N, k] from touching, so that no step shows the edge.

    A gap in height does, unless the known pixels lie on one gentle plane. Blocks of 2 x 2 cannot hide an edge.
    """
    hidden: Bools = np.zeros(len(blocks), dtype=np.bool_)
    side = round(blocks.shape[1] ** 0.5)
    if side == 2 or not len(blocks):
        return hidden
    gaps = np.nan_to_num(np.diff(np.sort(blocks, axis=1)))
    hidden = np.greater(gaps.max(axis=1), EDGE_M) & ~np.all(known, axis=1)
    at = np.flatnonzero(hidden)
    r, c = np.indices((side, side)).reshape(2, -1) - (side - 1) / 2
    design = np.stack([np.ones(side * side), r, c], axis=1)  # height = level + down * r + right * c
    heights = np.where(known[at], blocks[at], 0).astype(np.float64)
    # More than half of the pixels are known: they never lie on one line, so the equations have a solution.
    normal = np.einsum("nk,ki,kj->nij", known[at].astype(np.float64), design, design)
    planes = np.linalg.solve(normal, (heights @ design)[:, :, None])[:, :, 0]
    residual = np.abs(np.where(known[at], planes @ design.T - heights, 0)).max(axis=1)
    gentle = (residual <= SLOPE_TOLERANCE_M) & (np.abs(planes[:, 1:]).max(axis=1) <= EDGE_M)
    hidden[at[gentle]] = False
    return hidden


def _larger_surface(blocks: F32) -> Bools:
    """Members [N, k] of the largest group of each block, groups being parted by gaps above `EDGE_M`."""
    heights = np.sort(blocks, axis=1)  # NaN last: gaps to it are NaN, which part as well
    joined: Bools = np.asarray(np.diff(heights, axis=1) <= EDGE_M)
    run = np.ones(len(blocks), dtype=np.intp)
    best = run.copy()
    top = np.zeros(len(blocks), dtype=np.intp)
    for j in range(1, heights.shape[1]):
        run = np.where(joined[:, j - 1], run + 1, 1)
        # ">=": of two groups of one size the taller; a NaN never ends a group.
        better = (run >= best) & ~np.isnan(heights[:, j])
        best, top = np.where(better, run, best), np.where(better, j, top)
    rows = np.arange(len(blocks))
    low, high = heights[rows, top - best + 1], heights[rows, top]
    inside: Bools = np.greater_equal(blocks, low[:, None]) & np.less_equal(blocks, high[:, None])
    return inside


def enlarge_agl(agl_m: F32, factor: int, size: tuple[int, int]) -> F32:
    """float32 metres [h, w] -> `size` (rows, columns), the inverse of `reduce_agl`.

    Each pixel is spread as a plane through its centre, so a block keeps its mean. The plane's slope is the
    limited central difference of the neighbours (after van Leer 1977): zero at edges and peaks, the slope
    itself on slopes, and inside the tile never beyond the neighbours' heights. Unknown
    pixels become unknown blocks. `size` may cut up to factor - 1 rows and columns that were padding;
    ValueError for any other size.
    """
    rows, columns = agl_m.shape
    if not (0 <= rows * factor - size[0] < factor and 0 <= columns * factor - size[1] < factor):
        raise ValueError(f"{rows} x {columns} pixels enlarged by {factor} do not make {size[0]} x {size[1]}")
    if factor == 1:
        return agl_m
    down = _limited_slope(agl_m, factor) / np.float32(factor)
    right = _limited_slope(agl_m.T, factor).T / np.float32(factor)
    large = np.empty((rows, factor, columns, factor), dtype=np.float32)
    for p in range(factor):
        line = agl_m + down * np.float32(p - (factor - 1) / 2)
        for q in range(factor):
            large[:, p, :, q] = line + right * np.float32(q - (factor - 1) / 2)
    return large.reshape(rows * factor, columns * factor)[: size[0], : size[1]]


def _limited_slope(agl_m: F32, factor: int) -> F32:
    """Slope down the rows, metres per reduced pixel, [h, w]; never NaN."""
    step = np.diff(agl_m, axis=0)
    missing = np.full((2, agl_m.shape[1]), np.nan, dtype=np.float32)
    steps = np.concatenate([missing, step, missing])  # step j leads from pixel j - 2 to pixel j - 1
    before, after = steps[1:-2], steps[2:-1]
    # Without a neighbour on one side, the step beyond the other one tells a slope from an edge.
    before, after = (
        np.where(np.isnan(before), steps[3:], before),
        np.where(np.isnan(after), steps[:-3], after),
    )
    central = (before + after) / np.float32(2)
    # Two slopes reach (factor - 1) / (2 factor) of themselves into a corner: this share never overshoots.
    limit = np.float32(factor / (factor - 1)) * np.minimum(np.abs(before), np.abs(after))
    slope = np.where(before * after > 0, np.sign(central) * np.minimum(np.abs(central), limit), 0)
    return np.nan_to_num(slope.astype(np.float32))
